"""The slow, obvious form of every stored tensor: row by row, as the format's formulas read.

`verify` holds written files against it. It shares no arithmetic with `fxquant.kernels`.
"""

import torch
from torch import Tensor

from fxquant.schemes import Recipe, Scheme


def expected_tensors(recipe: Recipe, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Every tensor that one module of `recipe` owns, except the calibrated ones, from its weight [n, k]."""
    rows = [row.float() for row in weight]
    n, groups = len(rows), recipe.in_features // recipe.group_size if recipe.group_size else 1
    expected = {"weight_offset": torch.zeros(n, 1)}
    if bias is not None:
        expected["bias"] = bias.to(recipe.dtype)
    if recipe.scheme is not Scheme.W4A8_DYNAMIC:
        pairs = [_symmetric_row(row, 127, -128, 127) for row in rows]
        expected["weight"] = torch.stack([q for q, _ in pairs]).to(torch.int8)
        expected["weight_scale"] = torch.stack([scale for _, scale in pairs]).view(n, 1)
        return expected
    made = [_two_level_row(row, recipe.group_size) if recipe.group_size else _int4_row(row) for row in rows]
    codes, scales, seconds = (torch.stack(column) for column in zip(*made, strict=True))
    expected["weight"] = _pack(codes)
    expected["weight_scale"] = scales.view(n, 1)
    expected["scale_bias"] = _scale_bias(recipe, codes, scales, seconds)
    if recipe.group_size:
        expected["weight_scale_second"] = seconds
        expected["weight_offset_second"] = torch.zeros(n, groups, dtype=torch.int64)
    return expected


def contradiction(recipe: Recipe, stored: dict[str, Tensor], bias: Tensor | None) -> str | None:
    """Why the calibrated tensors of a static linear disagree with its range or with each other, or None."""
    observed = recipe.activation
    if observed is None:
        return "static, but the graph holds no observed range"
    dtype = observed.arithmetic
    low, high = torch.tensor(min(observed.low, 0), dtype=dtype), torch.tensor(max(observed.high, 0), dtype=dtype)
    scale = torch.maximum((high - low) / 255, torch.tensor(1.1920928955078125e-07, dtype=dtype))
    offset = min(max(float(torch.round(-low / scale)) - 128, -128.0), 127.0)
    input_scale, deq_scale = stored["input_scale"].float(), stored["deq_scale"]
    if deq_scale.dtype is torch.int64:
        deq_scale = deq_scale.to(torch.int32).view(torch.float32)
    if not torch.equal(stored["input_scale"], scale.to(recipe.dtype).view(1)):
        return f"input_scale is {input_scale.item()}, the observed range gives {scale.item()}"
    if stored["input_offset"].item() != offset:
        return f"input_offset is {stored['input_offset'].item()}, the observed range gives {offset}"
    if not torch.equal(deq_scale, input_scale * stored["weight_scale"].flatten()):
        return "deq_scale is not input_scale * weight_scale"
    for row, q in enumerate(stored["weight"]):
        folded = float(bias[row].float() / deq_scale[row]) if bias is not None and deq_scale[row] > 0 else 0.0
        if stored["quant_bias"][row].item() != round(folded - offset * int(q.long().sum())):
            return f"quant_bias of output {row} does not follow from bias, deq_scale, input_offset and weight"
    return None


def _symmetric_row(row: Tensor, maximum: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """q = clamp(rne(w / s)), s = max|w| / maximum; a row of zeros stays zeros with scale 0."""
    scale = row.abs().max() / maximum
    q = torch.zeros_like(row) if scale == 0 else torch.round(row / scale).clamp(low, high)
    return q, scale


def _int4_row(row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, scale = _symmetric_row(row, 7, -8, 7)
    return q, scale, torch.ones(1)


def _two_level_row(row: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    q8, scale = _symmetric_row(row, 119, -119, 119)
    seconds, codes = [], []
    for group in q8.split(group_size):
        second = max(1.0, float(torch.round(group.abs().max() / 7)))
        seconds.append(second)
        codes.append(torch.round(group / second).clamp(-8, 7))
    return torch.cat(codes), scale, torch.tensor(seconds)


def _pack(codes: Tensor) -> Tensor:
    """Two rows a byte, the even one in the low nibble, two's complement."""
    unsigned = codes.to(torch.int32) % 16
    packed = unsigned[0::2] + 16 * unsigned[1::2]
    return torch.where(packed > 127, packed - 256, packed).to(torch.int8)


def _scale_bias(recipe: Recipe, codes: Tensor, scales: Tensor, seconds: Tensor) -> Tensor:
    """8 * scale * sum of codes * second, over all of k or over 16 runs of it."""
    chunks = 16 if recipe.row_parallel else 1
    weights = codes.to(torch.int64).double()
    for group in range(seconds.shape[1]):
        width = codes.shape[1] // seconds.shape[1]
        weights[:, group * width : (group + 1) * width] *= seconds[:, group : group + 1]
    exact = scales.bfloat16() if recipe.group_size else scales
    sums = torch.stack([chunk.sum(1) for chunk in weights.chunk(chunks, 1)], 1)
    return (8 * exact.double().view(-1, 1) * sums).float()
