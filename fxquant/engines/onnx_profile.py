"""ONNX profiles: in which operators a graph says its quantized linears, and the weight format that these read."""

from collections.abc import Callable
from enum import IntEnum, StrEnum

from fxquant.engines.engine import Engine
from fxquant.schemes.weight_formats import WeightFormat

_EVERYWHERE = (
    "int8 activations are carried as uint8 = int8 + 128. int4 weights are read from their packed bytes and become int8 "
    "in memory. Everything else is float32; weights stored as bfloat16 or float16 are widened. "
)
_SATURATION = "On x86 without VNNI, session.x64quantprecision=1 keeps onnxruntime's u8 x s8 products from saturating."


class OnnxProfile(StrEnum):
    """Values of `--onnx-profile`, and of `profile` in the metadata of model.onnx.

    qdq      QuantizeLinear and DequantizeLinear around a MatMul of floats: what quantization-aware backends look for
    integer  MatMulInteger: exact whatever a backend fuses, the form to compare others with
    ort      int4 in onnxruntime's own operators, MatMulNBits and QMoE, over weights packed for them; int8 as in qdq
    """

    QDQ = "qdq"
    INTEGER = "integer"
    ORT = "ort"

    @property
    def contrib(self) -> bool:
        """Whether it has operators of domain com.microsoft."""
        return self is OnnxProfile.ORT


class AccuracyLevel(IntEnum):
    """Values of `--onnx-accuracy-level`: how onnxruntime's own operators multiply int4 weights.

    FLOAT  float32 activations: sums of float32 products with the weights' values
    INT8   int8 activations, a scale for each block of a row, where the processor has kernels for it
    """

    FLOAT = 0
    INT8 = 4


DEFAULT = OnnxProfile.QDQ
DEFAULT_LEVEL = AccuracyLevel.INT8

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
_ORT = (
    "Needs onnxruntime 1.31 or newer. int4 weights are multiplied by MatMulNBits and QMoE: codes and scales are exact, "
    "activations are {activations}. int8 linears are DequantizeLinear, MatMul, DequantizeLinear, with the codes of the "
    "fxq operators. Everything else is float32; weights stored as bfloat16 or float16 are widened. "
)
_ACTIVATIONS = {
    AccuracyLevel.FLOAT: "float32, where the fxq operators have int8 per token",
    AccuracyLevel.INT8: "rounded to int8 by the block, where the fxq operators round by the token",
}


def numerics(profile: OnnxProfile, level: AccuracyLevel) -> str:
    """What is exact, what is not, and what a session must be told; `numerics` in the metadata."""
    if profile.contrib:
        return _ORT.format(activations=_ACTIVATIONS[level]) + _SATURATION
    return _NUMERICS[profile] + _EVERYWHERE + _SATURATION


def weight_format(engine: Engine, profile: OnnxProfile) -> Callable[[int], WeightFormat]:
    """As `Engine.weight_format`, for the graph of `profile`."""
    return (lambda group_size: WeightFormat.BLOCKS) if profile.contrib else engine.weight_format
