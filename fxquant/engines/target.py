"""The engines a model can be compiled for."""

from enum import StrEnum


class Target(StrEnum):
    """What each loads is in `contract.yaml`, how its files are written in `fxquant.engines.table`."""

    ASCEND = "ascend"
    MINDIE = "mindie"
    VLLM_ASCEND = "vllm-ascend"
    SGLANG_NPU = "sglang-npu"
    ONNX = "onnx"
