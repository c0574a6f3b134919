"""Weight formulas once more, one number at a time, and what compares with them."""

from dataclasses import replace

import numpy as np
import torch
from places import REFERENCE
from torch import Tensor

from fxquant.kernels.module_tensors import make_tensors
from fxquant.schemes.schemes import Recipe, Scheme
from fxquant.schemes.weight_formats import WeightFormat

EPS = 1.1920928955078125e-07
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EDGE = REFERENCE / "edge.safetensors"
"""Tensors that the reference quantizer wrote, where somebody put them beside the repository."""


def recipe_of(weight: Tensor, scheme: Scheme, group_size: int = 0, **changes: object) -> Recipe:
    n, k = weight.shape
    recipe = Recipe("model.linear", ("model.linear",), scheme, group_size, n, k, False, False, torch.bfloat16)
    return replace(recipe, **changes)


def codes_of(weight: Tensor, scheme: Scheme, group_size: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [n, k], scale float32 [n, 1], second scale float32 [n, G], by the kernels, one code a byte."""
    tensors = make_tensors(recipe_of(weight, scheme, group_size, weight_format=WeightFormat.UNPACKED), "w", weight)
    return tensors["weight"], tensors["weight_scale"], tensors.get("weight_scale_second", torch.ones(len(weight), 1))


def same(x: Tensor, y: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (x, y)]
    return x.dtype is y.dtype and x.shape == y.shape and torch.equal(*bits)


def same_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(tensors) == set(expected) and all(same(tensors[name], expected[name]) for name in expected)


def unpack(packed: Tensor) -> list[list[int]]:
    """Bytes [n/2, k] → rows [n, k], nibble by nibble."""
    rows = []
    for byte_row in packed.tolist():
        low, high = [(byte & 15) for byte in byte_row], [(byte >> 4 & 15) for byte in byte_row]
        rows += [[nibble - 16 if nibble > 7 else nibble for nibble in row] for row in (low, high)]
    return rows


# the formulas once more, one number at a time


def rounded(value: np.float32, low: int, high: int) -> int:
    """Python rounds halves to even, as the format does."""
    return min(max(round(float(value)), low), high)


def loop_row(row: np.ndarray, maximum: int, low: int, high: int) -> tuple[list[int], np.float32]:
    scale = max(abs(value) for value in row) / np.float32(maximum)
    return [0 if scale == 0 else rounded(value / scale, low, high) for value in row], scale


def loop_two_level(row: np.ndarray, group_size: int) -> tuple[list[int], np.float32, list[int]]:
    q8, scale = loop_row(row, 119, -119, 119)  # bounds that only a subnormal scale, a rounded one, can reach
    q4, seconds = [], []
    for start in range(0, len(q8), group_size):
        group = q8[start : start + group_size]
        seconds.append(max(1, round(max(abs(q) for q in group) / 7)))
        q4 += [min(max(round(q / seconds[-1]), -8), 7) for q in group]
    return q4, scale, seconds


def loop_scale_bias(q4: list[int], scale: float, seconds: list[int], chunks: int) -> list[float]:
    weights = [q * seconds[index * len(seconds) // len(q4)] for index, q in enumerate(q4)]
    width = len(q4) // chunks
    return [8 * scale * sum(weights[start : start + width]) for start in range(0, len(q4), width)]


def bfloat16(value: np.float32) -> float:
    """Round half to even at 16 bits, on the bits."""
    bits = int(np.float32(value).view(np.uint32))
    return float(np.uint32(bits + 0x7FFF + (bits >> 16 & 1) >> 16 << 16).view(np.float32))
