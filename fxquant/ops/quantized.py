"""Quantized operators: quantize → integer matmul → dequantize. Integers are exact: products are summed in int32.

Notation: k in_features, n out_features, M rows, E experts, G = k / group_size, rne = round half to even.
Floats are float32 regardless of the model's dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.ops.library import define, expect
from fxquant.ops.linear_forms import Form, Step
from fxquant.schemes.schemes import Activation

SMALLEST_ROW_MAXIMUM = 1e-30
"""A row with a smaller maximum counts as zero and quantizes to zeros; 127 / 1e-30 is still finite in float32."""

EXACT_FEATURES = 1024
"""Sums of this many int8 products are at most 2**24, so float32 holds every partial sum exactly, in any order."""


def _quantize_static_shape(x: Tensor, input_scale: Tensor, input_offset: Tensor) -> Tensor:
    expect(input_scale.numel() == 1 and input_offset.numel() == 1, "fxq::quantize_static: one scale and one offset")
    return x.new_empty(x.shape, dtype=torch.int8)


@define("quantize_static(Tensor x, Tensor input_scale, Tensor input_offset) -> Tensor", _quantize_static_shape)
def quantize_static(x: Tensor, input_scale: Tensor, input_offset: Tensor) -> Tensor:
    """`clamp(rne(x / input_scale + input_offset), -128, 127)` as int8; both parameters [1], in any float dtype."""
    return torch.round(x.float() / input_scale.float() + input_offset.float()).clamp(-128, 127).to(torch.int8)


def _quantize_per_token_shape(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@define("quantize_per_token(Tensor x) -> (Tensor, Tensor)", _quantize_per_token_shape)
def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `rne(x * (127 / m))` and float32 scale `m / 127` [..., 1], with m the largest magnitude of the row.

    A row of zeros gives zeros and scale 0. The integers lie in [-127, 127].
    """
    wide = x.float()
    maximum = wide.abs().amax(-1, keepdim=True)
    step = torch.where(
        maximum < SMALLEST_ROW_MAXIMUM, 0.0, torch.tensor(127.0) / maximum
    )  # torch computes 127 / maximum as reciprocal() * 127, which rounds twice
    return torch.round(wide * step).to(torch.int8), maximum / 127


def _matmul_shape(x: Tensor, rows: int, in_features: int, name: str) -> Tensor:
    expect(x.dtype == torch.int8, f"fxq::{name}: x must be int8, not {x.dtype}")
    expect(x.shape[-1] == in_features, f"fxq::{name}: x has {x.shape[-1]} features, the weight {in_features}")
    return x.new_empty((*x.shape[:-1], rows), dtype=torch.int32)


def _int_matmul_shape(x: Tensor, weight: Tensor) -> Tensor:
    expect(weight.dtype == torch.int8, f"fxq::int_matmul: weight must be int8, not {weight.dtype}")
    return _matmul_shape(x, weight.shape[0], weight.shape[1], "int_matmul")


@define("int_matmul(Tensor x, Tensor weight) -> Tensor", _int_matmul_shape)
def int_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """int8 x [..., k], int8 weight [n, k] → int32 [..., n] = `x @ weight.T`, exact while k ≤ 131,000."""
    result = torch.zeros((*x.shape[:-1], weight.shape[0]), dtype=torch.int32, device=x.device)
    for part, columns in zip(x.split(EXACT_FEATURES, -1), weight.split(EXACT_FEATURES, -1), strict=True):
        result += (part.float() @ columns.float().T).int()  # torch._int_mm is twenty times slower without VNNI
    return result


def _int4_matmul_shape(x: Tensor, weight: Tensor, weight_scale_second: Tensor | None = None) -> Tensor:
    expect(weight.dtype == torch.int8, f"fxq::int4_matmul: packed weight must be int8, not {weight.dtype}")
    return _matmul_shape(x, 2 * weight.shape[0], weight.shape[1], "int4_matmul")


@define("int4_matmul(Tensor x, Tensor weight, Tensor? weight_scale_second=None) -> Tensor", _int4_matmul_shape)
def int4_matmul(x: Tensor, weight: Tensor, weight_scale_second: Tensor | None = None) -> Tensor:
    """int8 x [..., k] times the int8 weight from `expand_int4` → int32 [..., n], exact."""
    return int_matmul(x, expand_int4(weight, weight_scale_second))


def expand_int4(weight: Tensor, weight_scale_second: Tensor | None) -> Tensor:
    """Packed int4 and its integer group scales → int8 [n, k] = `q4 * weight_scale_second`.

    weight int8 [n/2, k]: row 2i in the low nibble, row 2i + 1 in the high one, two's complement.
    weight_scale_second float32 [n, G], integers with |q4 * scale| ≤ 127; None multiplies by one.
    """
    nibbles = torch.stack((weight << 4 >> 4, weight >> 4), 1).flatten(0, 1)
    if weight_scale_second is None:
        return nibbles
    group_size = nibbles.shape[1] // weight_scale_second.shape[1]
    return nibbles * weight_scale_second.to(torch.int8).repeat_interleave(group_size, 1)


def _dequantize_static_shape(acc: Tensor, deq_scale: Tensor, quant_bias: Tensor) -> Tensor:
    expect(quant_bias.dtype == torch.int32, f"fxq::dequantize_static: quant_bias must be int32, not {quant_bias.dtype}")
    expect(acc.shape[-1] == deq_scale.shape[0], "fxq::dequantize_static: one deq_scale per output feature")
    return acc.new_empty(acc.shape, dtype=torch.float32)


@define("dequantize_static(Tensor acc, Tensor deq_scale, Tensor quant_bias) -> Tensor", _dequantize_static_shape)
def dequantize_static(acc: Tensor, deq_scale: Tensor, quant_bias: Tensor) -> Tensor:
    """`float32(acc + quant_bias) * deq_scale`: acc int32 [..., n], quant_bias int32 [n], deq_scale [n].

    deq_scale is float32, or int64 with the float32 bits in its low word (float16 models).
    """
    return (acc + quant_bias).float() * decode_deq_scale(deq_scale)


def decode_deq_scale(deq_scale: Tensor) -> Tensor:
    """float32 [n] from either stored form of `deq_scale`."""
    return deq_scale.to(torch.int32).view(torch.float32) if deq_scale.dtype == torch.int64 else deq_scale


def _dequantize_per_token_shape(
    acc: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    expect(acc.shape[-1] == weight_scale.shape[0], "fxq::dequantize_per_token: one weight_scale per output feature")
    return acc.new_empty(acc.shape, dtype=torch.float32)


@define(
    "dequantize_per_token(Tensor acc, Tensor x_scale, Tensor weight_scale, Tensor? bias=None) -> Tensor",
    _dequantize_per_token_shape,
)
def dequantize_per_token(acc: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`float32(acc) * weight_scale * x_scale + bias`: acc int32 [..., n], x_scale [..., 1], weight_scale [n, 1]."""
    y = acc.float() * weight_scale.squeeze(-1) * x_scale
    return y if bias is None else y + bias.float()


def _grouped_int_matmul_shape(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _matmul_shape(x, weight.shape[1], weight.shape[2], "grouped_int_matmul")


@define("grouped_int_matmul(Tensor x, Tensor weight, Tensor counts) -> Tensor", _grouped_int_matmul_shape)
def grouped_int_matmul(x: Tensor, weight: Sequence[Tensor], counts: Tensor) -> Tensor:
    """int8 x [M, k], rows sorted by expert; int8 weight [E, n, k]; counts int64 [E] → int32 [M, n]."""
    return torch.cat([int_matmul(rows, weight[expert]) for expert, rows in _blocks(x, counts)])


def _grouped_int4_matmul_shape(x: Tensor, weight: Tensor, counts: Tensor, second: Tensor | None = None) -> Tensor:
    return _matmul_shape(x, 2 * weight.shape[1], weight.shape[2], "grouped_int4_matmul")


@define(
    "grouped_int4_matmul(Tensor x, Tensor weight, Tensor counts, Tensor? weight_scale_second=None) -> Tensor",
    _grouped_int4_matmul_shape,
)
def grouped_int4_matmul(
    x: Tensor, weight: Sequence[Tensor], counts: Tensor, weight_scale_second: Sequence[Tensor] | None = None
) -> Tensor:
    """As `grouped_int_matmul`, with packed int4 [E, n/2, k] and group scales [E, n, G], expanded per expert."""
    parts = []
    for expert, rows in _blocks(x, counts):
        second = None if weight_scale_second is None else weight_scale_second[expert]
        parts.append(int4_matmul(rows, weight[expert], second))
    return torch.cat(parts)


def _grouped_dequantize_shape(acc: Tensor, x_scale: Tensor, weight_scale: Tensor, counts: Tensor) -> Tensor:
    expect(acc.shape[-1] == weight_scale.shape[1], "fxq::grouped_dequantize: one weight_scale per output feature")
    return acc.new_empty(acc.shape, dtype=torch.float32)


@define(
    "grouped_dequantize(Tensor acc, Tensor x_scale, Tensor weight_scale, Tensor counts) -> Tensor",
    _grouped_dequantize_shape,
)
def grouped_dequantize(acc: Tensor, x_scale: Tensor, weight_scale: Sequence[Tensor], counts: Tensor) -> Tensor:
    """`dequantize_per_token` with each expert's own weight_scale: acc int32 [M, n], weight_scale [E, n, 1]."""
    scales = x_scale.split(counts.tolist())
    return torch.cat(
        [dequantize_per_token(rows, scales[expert], weight_scale[expert]) for expert, rows in _blocks(acc, counts)]
    )


def _blocks(rows: Tensor, counts: Tensor) -> list[tuple[int, Tensor]]:
    """(expert, its rows) for each expert with rows; one empty block if there are no rows at all."""
    blocks = [(expert, block) for expert, block in enumerate(rows.split(counts.tolist())) if len(block)]
    return blocks or [(0, rows)]


PER_TOKEN = Step(quantize_per_token, ("x", "x_scale"), ("quantize", "int8", "scale"))
_STATIC: Form = (
    Step(quantize_static, ("x",), ("input_int8",)),
    Step(int_matmul, ("acc",), ("int32",)),
    Step(dequantize_static, ("y",), ("dequantize",)),
)
_DEQUANTIZE = Step(dequantize_per_token, ("y",), ("dequantize",))

LINEAR_FORMS: dict[tuple[int, Activation], Form] = {
    (8, Activation.PER_TENSOR): _STATIC,
    (8, Activation.BOTH): _STATIC,
    (8, Activation.PER_TOKEN): (PER_TOKEN, Step(int_matmul, ("acc",), ("int32",)), _DEQUANTIZE),
    (4, Activation.PER_TOKEN): (PER_TOKEN, Step(int4_matmul, ("acc",), ("int32",)), _DEQUANTIZE),
}
"""Bits of a weight, and how inputs are quantized → the calls that take the place of a linear."""

GROUPED = {
    quantize_per_token: quantize_per_token,
    int_matmul: grouped_int_matmul,
    int4_matmul: grouped_int4_matmul,
    dequantize_per_token: grouped_dequantize,
}
"""Operator of a form → the one that does the same on rows sorted by expert. Forms with any other are of no experts."""
