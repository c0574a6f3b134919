"""The engines a model can be compiled for."""

from enum import StrEnum


class Target(StrEnum):
    """Every target writes the same weight directory; they differ in the graph beside it."""

    ASCEND = "ascend"
    ONNX = "onnx"

    @property
    def readers(self) -> str:
        """Which engines and versions read the output."""
        return _READERS[self]


_READERS = {
    Target.ASCEND: (
        "SGLang-NPU (group size 256 or 0); vllm-ascend releases from 2025-08-20 to 2026-08-08 for per-group experts, "
        "later ones read per-channel experts only (policy deepseek_w4a8_per_channel)"
    ),
    Target.ONNX: "ONNX Runtime 1.23 or later on CPU, opset 21, IR 10; the weight directory is that of target ascend",
}
