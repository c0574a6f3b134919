"""The engines a model can be compiled for."""

from enum import StrEnum


class Target(StrEnum):
    """What each loads is in `fxquant.contracts`, how its files are written in `fxquant.targets.engines`."""

    ASCEND = "ascend"
    MINDIE = "mindie"
    VLLM_ASCEND = "vllm-ascend"
    SGLANG_NPU = "sglang-npu"
    ONNX = "onnx"
