"""Slow reference of every stored tensor, as the format's formulas read.

`verify` compares written files with it. It shares no arithmetic with `fxquant.kernels`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.schemes.schemes import Recipe, WeightAlgorithm, tensor_specs
from fxquant.schemes.weight_formats import WeightFormat
from fxquant.verification.reference_search import CodesAndScales, highest_code, searched_codes

ROWS = 256
"""Of a weight that are summed at a time."""
FEEDBACK_ERROR = 0.25
"""Share of a row's squares that GPTQ's squared error stays below; codes of another row are off by one to two."""


def expected_tensors(
    recipe: Recipe,
    weight: Tensor,
    bias: Tensor | None,
    solved: Tensor | None = None,
    searched: CodesAndScales | None = None,
) -> dict[str, Tensor]:
    """Every tensor that one module of `recipe` owns, except the calibrated ones, from its weight [n, k].

    `solved`: codes int8 [n, k] that calibration found, for GPTQ; all else follows from the weight. `searched`: the
    result of `expected_codes`, if known already.
    """
    codes, scales, seconds = searched or expected_codes(recipe, weight)
    codes = codes if solved is None else solved.float()
    n, groups = seconds.shape
    packed = recipe.int4 and recipe.weight_format.packed
    expected = {
        "weight": _stored_form(recipe)(codes),
        "weight_scale": scales.view(n, 1),
        "weight_offset": torch.zeros(n, 1),
        "weight_scale_second": seconds,
        "weight_offset_second": torch.zeros(n, groups, dtype=torch.int64),
    }
    if packed and recipe.scheme.integer_inputs:
        expected["scale_bias"] = scale_bias(recipe, codes, scales, seconds)
    if bias is not None:
        expected["bias"] = bias.to(torch.float32 if recipe.weight_format.float32_parameters else recipe.dtype)
    return {suffix: expected[suffix] for suffix in tensor_specs(recipe) if suffix in expected}


def expected_codes(recipe: Recipe, weight: Tensor) -> CodesAndScales:
    """Codes [n, k], scales [n], second scales [n, G]."""
    if recipe.algorithm.scales is not WeightAlgorithm.MIN_MAX:
        return searched_codes(recipe, weight)
    high = highest_code(recipe)
    if recipe.group_size:
        return _two_level(weight.float(), recipe.group_size)
    return *_symmetric(weight.float(), high, -high - 1, high, recipe.scale_dtype), torch.ones(len(weight), 1)


def wrong_codes(
    recipe: Recipe, weight: Tensor, stored: Tensor, searched: CodesAndScales | None = None, first: int = 0
) -> str | None:
    """Why codes that calibration found cannot be those of the weight [n, k], its rows from `first` on; or None.

    The format must be able to hold them. And though GPTQ does not choose the nearest codes, it stays near.
    """
    codes, scales, seconds = searched or expected_codes(recipe, weight)
    wide = seconds.repeat_interleave(codes.shape[1] // seconds.shape[1], 1)
    limit = highest_code(recipe)
    if bool((stored > limit).any() | (stored < -limit - 1).any()):
        return f"a code is outside {-limit - 1} … {limit}"
    if recipe.group_size and bool(((stored * wide).abs() > 119).any()):
        return "a code times its second scale is beyond 119"
    steps, exact = scales.view(-1, 1) * wide, weight.float()
    far = ((stored * steps - exact) ** 2).sum(1) > FEEDBACK_ERROR * (exact**2).sum(1)
    return f"row {first + int(far.nonzero()[0])} is far from the source" if bool(far.any()) else None


def contradiction(
    recipe: Recipe,
    stored: dict[str, Tensor],
    bias: Tensor | None,
    weight_scale: Tensor | None = None,
    rows: list[int] | None = None,
) -> str | None:
    """Why the calibrated tensors of a static linear disagree with its range or each other, the tensor first; or None.

    `weight_scale` is the one that follows from the source, of all rows [n] or of `rows`, if none is stored.
    """
    observed = recipe.activation
    if observed is None:
        return "input_scale has no range: the graph holds none"
    dtype = observed.arithmetic
    low, high = torch.tensor(min(observed.low, 0), dtype=dtype), torch.tensor(max(observed.high, 0), dtype=dtype)
    scale = torch.maximum((high - low) / 255, torch.tensor(1.1920928955078125e-07, dtype=dtype))
    offset = min(max(float(torch.round(-low / scale)) - 128, -128.0), 127.0)
    input_scale, deq_scale = stored["input_scale"].float(), stored["deq_scale"]
    if deq_scale.dtype is torch.int64:
        deq_scale = deq_scale.to(torch.int32).view(torch.float32)
    if input_scale.item() != scale.to(recipe.dtype).item():
        return f"input_scale is {input_scale.item()}, the observed range gives {scale.item()}"
    if stored["input_offset"].item() != offset:
        return f"input_offset is {stored['input_offset'].item()}, the observed range gives {offset}"
    weight_scale, rows = (stored["weight_scale"], None) if "weight_scale" in stored else (weight_scale, rows)
    held = deq_scale if rows is None else deq_scale[rows]
    if weight_scale is not None and not torch.equal(held, input_scale * weight_scale.flatten()):
        return "deq_scale is not input_scale * weight_scale"
    sums = [total for rows in stored["weight"].split(ROWS) for total in rows.long().sum(1).tolist()]
    biases = stored["quant_bias"].tolist()
    for row, total in enumerate(sums):
        folded = float(bias[row].float() / deq_scale[row]) if bias is not None and deq_scale[row] > 0 else 0.0
        if biases[row] != round(folded - offset * total):
            return f"quant_bias of output {row} does not follow from bias, deq_scale, input_offset and weight"
    return None


def _symmetric(
    rows: Tensor, maximum: int, low: int, high: int, rounded_to: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """q = clamp(rne(w / s)), s = max|w| / maximum per row in `rounded_to`; a row of zeros stays so, scale 0."""
    scales = (rows.abs().amax(1) / maximum).to(rounded_to).float()
    q = torch.round(rows / torch.where(scales == 0, 1, scales).unsqueeze(1)).clamp(low, high)
    return torch.where((scales == 0).unsqueeze(1), 0, q), scales


def _two_level(rows: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    q8, scales = _symmetric(rows, 119, -119, 119)
    groups = q8.unflatten(1, (-1, group_size))
    seconds = torch.round(groups.abs().amax(-1) / 7).clamp(min=1)
    codes = torch.round(groups / seconds.unsqueeze(-1)).clamp(-8, 7)
    return codes.flatten(1), scales, seconds


def _stored_form(recipe: Recipe) -> Callable[[Tensor], Tensor]:
    if recipe.int4 and recipe.weight_format.packed:
        return _pack
    if recipe.int4 and recipe.weight_format is WeightFormat.BLOCKS:
        return _pack_along_k
    return lambda codes: codes.to(torch.int8)


def _pack_along_k(codes: Tensor) -> Tensor:
    """Two columns per byte, the even one in the low nibble, 8 added to each."""
    return (codes[:, 0::2] + 8 + 16 * (codes[:, 1::2] + 8)).to(torch.uint8)


def codes_along_k(packed: Tensor) -> Tensor:
    """int8 [n, k] of `_pack_along_k`."""
    wide = packed.to(torch.int32)
    codes = torch.empty(len(packed), 2 * packed.shape[1], dtype=torch.int8)
    codes[:, 0::2], codes[:, 1::2] = wide % 16 - 8, wide // 16 - 8
    return codes


def _pack(codes: Tensor) -> Tensor:
    """Two rows per byte, the even one in the low nibble, two's complement."""
    unsigned = codes.to(torch.int32) % 16
    packed = unsigned[0::2] + 16 * unsigned[1::2]
    return torch.where(packed > 127, packed - 256, packed).to(torch.int8)


def scale_bias(recipe: Recipe, codes: Tensor, scales: Tensor, seconds: Tensor) -> Tensor:
    """8 * scale * sum of codes * second, over all of k or over 16 runs of it."""
    chunks = 16 if recipe.row_parallel else 1
    weights = codes.to(torch.int64).double()
    for group in range(seconds.shape[1]):
        width = codes.shape[1] // seconds.shape[1]
        weights[:, group * width : (group + 1) * width] *= seconds[:, group : group + 1]
    # as in the engines' reference: only the bias of two levels uses bfloat16 scales
    exact = scales.bfloat16() if recipe.group_size else scales
    sums = torch.stack([chunk.sum(1) for chunk in weights.chunk(chunks, 1)], 1)
    return (8 * exact.double().view(-1, 1) * sums).float()
