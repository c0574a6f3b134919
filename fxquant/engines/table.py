"""One module a target: how its files are named, what they say, and who reads them."""

from fxquant.engines import ascend, mindie, onnx, sglang_npu, vllm_ascend
from fxquant.engines.engine import Engine, group_size
from fxquant.engines.target import Target

ENGINES: dict[Target, Engine] = {
    Target.ASCEND: ascend.ENGINE,
    Target.MINDIE: mindie.ENGINE,
    Target.VLLM_ASCEND: vllm_ascend.ENGINE,
    Target.SGLANG_NPU: sglang_npu.ENGINE,
    Target.ONNX: onnx.ENGINE,
}

__all__ = ["ENGINES", "Engine", "group_size"]
