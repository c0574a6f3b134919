"""Engine table: engines a model can be compiled for, by name. All other code asks it; it imports no torch."""

from enum import StrEnum
from pathlib import Path

from fxquant.engines import ascend, mindie, onnx, sglang_npu, vllm_ascend
from fxquant.engines.engine import Engine


class Target(StrEnum):
    """Values of `--target`, and of `target` in manifests and contracts. The package of "some-name" is `some_name`."""

    ASCEND = "ascend"
    MINDIE = "mindie"
    VLLM_ASCEND = "vllm-ascend"
    SGLANG_NPU = "sglang-npu"
    ONNX = "onnx"


ENGINES: dict[Target, Engine] = {
    Target.ASCEND: ascend.ENGINE,
    Target.MINDIE: mindie.ENGINE,
    Target.VLLM_ASCEND: vllm_ascend.ENGINE,
    Target.SGLANG_NPU: sglang_npu.ENGINE,
    Target.ONNX: onnx.ENGINE,
}
DEFAULT = Target.ASCEND


def weight_stems() -> tuple[str, ...]:
    """Beginnings of the names of weight files, of all engines."""
    return tuple(sorted({engine.stem for engine in ENGINES.values()}))


def description_stems() -> tuple[str, ...]:
    """Names of description files without their suffix, of all engines."""
    return tuple(sorted({Path(engine.description).stem for engine in ENGINES.values()}))


def onnx_targets() -> list[Target]:
    """Targets whose graph is ONNX."""
    return [target for target, engine in ENGINES.items() if not engine.npu_graph]
