"""ONNX profiles: in which operators a graph says its quantized linears, over the same weight files."""

from enum import StrEnum

_EVERYWHERE = (
    "int8 activations are carried as uint8 = int8 + 128. int4 weights are read from their packed bytes and become int8 "
    "in memory. Everything else is float32; weights stored as bfloat16 or float16 are widened. "
)
_SATURATION = "On x86 without VNNI, session.x64quantprecision=1 keeps onnxruntime's u8 x s8 products from saturating."


class OnnxProfile(StrEnum):
    """Values of `--onnx-profile`, and of `profile` in the metadata of model.onnx.

    qdq      QuantizeLinear and DequantizeLinear around a MatMul of floats: what quantization-aware backends look for
    integer  MatMulInteger: exact whatever a backend fuses, the form to compare others with
    """

    QDQ = "qdq"
    INTEGER = "integer"

    @property
    def numerics(self) -> str:
        """What is exact, what is not, and what a session must be told; `numerics` in the metadata."""
        return _NUMERICS[self] + _EVERYWHERE + _SATURATION


DEFAULT = OnnxProfile.QDQ

_NUMERICS = {
    OnnxProfile.QDQ: (
        "Quantized linears are DequantizeLinear, MatMul, DequantizeLinear. Codes per token are those of the fxq "
        "operators, bit for bit; static ones may be the next code where a value lies at a tie. A backend that fuses "
        "the product sums integers in int32; one that does not sums float32 values of the same integers. "
    ),
    OnnxProfile.INTEGER: (
        "Integer products are exact, summed in int32; quantized values and scales are bit-identical to the fxq "
        "operators. "
    ),
}
