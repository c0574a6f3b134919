"""Module tensors: recipe and float weight → every tensor that the linear owns in the weight file."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxquant.errors import FxquantError, InternalError
from fxquant.kernels import pack_int4 as kernels
from fxquant.kernels.activation import encode_deq_scale, fused_parameters, static_parameters
from fxquant.kernels.int4 import TWO_LEVEL_MAXIMUM
from fxquant.kernels.search import ROW_KERNELS
from fxquant.kernels.source_rows import KERNEL_DTYPES, SourceRows, rows_of
from fxquant.schemes.schemes import ActivationRange, Recipe, tensor_specs


@dataclass(frozen=True)
class _Rows:
    """Output buffers of the kernels for a number of rows; see `int8_rows` and `int4_rows`."""

    codes: np.ndarray
    scale: np.ndarray
    second: np.ndarray
    bias: np.ndarray
    sums: np.ndarray

    @classmethod
    def empty(cls, recipe: Recipe, n: int, packed: bool) -> "_Rows":
        groups = recipe.in_features // recipe.group_size if recipe.int4 and recipe.group_size else 0
        chunks = recipe.scale_bias_columns if packed else 0
        if recipe.int4 and (recipe.in_features % max(recipe.group_size, 1) or recipe.in_features % max(chunks, 1)):
            raise ValueError(f"{groups} groups and {chunks} chunks do not divide {recipe}")
        return cls(
            np.empty((n // 2 if packed else n, recipe.in_features), np.int8),
            np.empty(n, np.float32),
            np.empty((n, groups), np.float32),
            np.empty((n, chunks), np.float32),
            np.empty(n, np.int64),
        )

    def make(self, recipe: Recipe, source: SourceRows) -> int:
        """Fill the buffers from as many rows. Returns the first row with NaN or infinity, or -1."""
        if (source.rows, source.in_features) != (len(self.scale), self.codes.shape[1]):
            raise ValueError(f"{source.rows} rows of {source.in_features} in room for {len(self.scale)} of {recipe}")
        rows = source.encoded()
        dtype = KERNEL_DTYPES[torch.float32 if recipe.int4 and recipe.group_size else recipe.scale_dtype]
        kernels, bits = ROW_KERNELS.get(recipe.algorithm.scales), recipe.scheme.weight_bits
        if kernels is None or bits is None or bits not in kernels.by_bits:
            raise InternalError(recipe.module, f"no kernel for {bits} bits by {recipe.algorithm}")
        tensors = (self.second, self.bias) if recipe.int4 else (self.sums,)
        bad: int = kernels.by_bits[bits](rows, dtype, *kernels.options, self.codes, self.scale, *tensors)
        return bad

    def take(self, recipe: Recipe, codes: Tensor) -> None:
        """Replace the codes by `codes` int8 [n, k], and recompute the sums and bias that follow from them."""
        if codes.shape != (len(self.scale), self.codes.shape[1]) or codes.dtype is not torch.int8:
            raise ValueError(f"{codes.dtype}{list(codes.shape)} codes for {len(self.scale)} rows of {recipe}")
        self.sums[:] = codes.sum(1, dtype=torch.int64).numpy()
        packed = len(self.codes) < len(self.scale)
        self.codes[:] = (kernels.pack_int4(codes) if packed else codes).numpy()
        if self.bias.shape[1]:
            scale, second = torch.from_numpy(self.scale).view(-1, 1), torch.from_numpy(self.second)
            grouped = second if recipe.group_size else None
            self.bias[:] = kernels.scale_bias(codes, scale, grouped, self.bias.shape[1]).numpy()


class ModuleMaker:
    """Makes the tensors of one module from its rows, in order, block by block. Not thread-safe.

    Errors name `place`; bias [n] has the model's dtype.
    """

    def __init__(self, recipe: Recipe, place: str, bias: Tensor | None = None) -> None:
        self._recipe, self._place, self._bias = recipe, place, bias
        self._specs = tensor_specs(recipe)
        self._packed = recipe.int4 and recipe.weight_format.packed
        self._static = _observed(recipe) if recipe.scheme.static else None
        self._room: _Rows | None = None
        self._tensors: dict[str, Tensor] = {}
        self._scales: list[Tensor] = []
        self._sums: list[Tensor] = []

    def rows(self, source: SourceRows, codes: Tensor | None = None) -> dict[str, Tensor]:
        """Name suffix → these rows of every tensor that has rows, with the dtypes of `schemes.tensor_specs`.

        `codes`: int8 [rows, k] that replace the kernel's, for GPTQ.

        The tensors are valid until the next call, which reuses their memory. Packed int4 needs an even number of rows
        per call, as two rows share a byte. Raises FxquantError for NaN or infinite weights.
        """
        n = source.rows
        if self._packed and n % 2:
            raise ValueError(f"{self._place}: {n} rows of {source.in_features}, packed in pairs")
        if self._room is None or len(self._room.scale) != n:
            self._room = _Rows.empty(self._recipe, n, self._packed)
            self._tensors = self._row_tensors(self._room)
        bad = self._room.make(self._recipe, source)
        if bad >= 0:
            fact = f"holds NaN or infinity (row {source.start + bad})."
            raise FxquantError(self._place, fact, "Repair the checkpoint: no scale can represent it.")
        if codes is not None:
            self._room.take(self._recipe, codes)
        if self._static is not None:
            # copies: the next call reuses the buffers
            self._scales.append(torch.from_numpy(self._room.scale.copy()))
            self._sums.append(torch.from_numpy(self._room.sums.copy()))
        tensors = dict(self._tensors)
        if self._specs["weight"].dtype is torch.uint8:
            tensors["weight"] = kernels.pack_blocks(tensors["weight"])
        return tensors

    def rest(self) -> dict[str, Tensor]:
        """After the last row: the tensors that need all rows."""
        tensors = {}
        if self._static is not None:
            scale, sums = torch.cat(self._scales), torch.cat(self._sums)
            tensors = _static(self._recipe, self._static, sums, scale, self._bias)
        if self._recipe.bias and self._bias is not None:
            tensors["bias"] = self._bias.to(self._specs["bias"].dtype)
        return tensors

    def _row_tensors(self, room: _Rows) -> dict[str, Tensor]:
        n, groups = room.second.shape
        tensors = {
            "weight": torch.from_numpy(room.codes),
            "weight_scale": torch.from_numpy(room.scale).view(n, 1),
            "weight_offset": torch.zeros(n, 1),
            "weight_scale_second": torch.from_numpy(room.second),
            "weight_offset_second": torch.zeros(n, groups, dtype=torch.int64),
            "scale_bias": torch.from_numpy(room.bias),
        }
        return {suffix: tensor for suffix, tensor in tensors.items() if suffix in self._specs}


def make_tensors(
    recipe: Recipe, place: str, weight: Tensor, bias: Tensor | None = None, codes: Tensor | None = None
) -> dict[str, Tensor]:
    """Name suffix → tensor, with the dtypes and shapes of `schemes.tensor_specs`.

    weight [n, k] and bias [n] have the model's dtype; errors name `place`; `codes` as in `ModuleMaker.rows`.
    Raises FxquantError for NaN or infinite weights.
    """
    maker = ModuleMaker(recipe, place, bias)
    tensors = maker.rows(rows_of(weight), codes) | maker.rest()
    return {suffix: tensors[suffix] for suffix in tensor_specs(recipe)}


def int4_tensors(recipe: Recipe, q: Tensor, scale: Tensor, second: Tensor | None) -> dict[str, Tensor]:
    """The tensors of an int4 linear in the recipe's weight_format, except offset and bias.

    q int8 [n, k] in [-8, 7], scale float32 [n, 1], second float32 [n, G] or None.
    """
    tensors = {"weight": q, "weight_scale": scale}
    if recipe.weight_format.packed:
        tensors["weight"] = kernels.pack_int4(q)
    elif not recipe.weight_format.offsets:
        tensors["weight"] = kernels.pack_blocks(q)
    if recipe.scale_bias_columns:
        tensors["scale_bias"] = kernels.scale_bias(q, scale, second, recipe.scale_bias_columns)
    if second is not None:
        tensors["weight_scale_second"] = second
        tensors["weight_offset_second"] = torch.zeros_like(second, dtype=torch.int64)
    return tensors


def fitted(recipe: Recipe, weight: Tensor, place: str) -> tuple[Tensor, Tensor, Tensor]:
    """codes int8 [n, k], scale float32 [n], second scales float32 [n, G] (or [n, 0]) of a weight [n, k] in the model's
    dtype. Raises FxquantError for NaN or infinite weights."""
    room = _Rows.empty(recipe, len(weight), packed=False)
    bad = room.make(recipe, rows_of(weight))
    if bad >= 0:
        fact = f"holds NaN or infinity (row {bad})."
        raise FxquantError(place, fact, "Repair the checkpoint: no scale can represent it.")
    codes, scale, second = (torch.from_numpy(array) for array in (room.codes, room.scale, room.second))
    return codes, scale, second


def code_limits(recipe: Recipe, second: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest code for second scales [n, k]; with two levels, `|q4 * second|` stays within 119."""
    highest = recipe.highest_code
    within = TWO_LEVEL_MAXIMUM // second if recipe.group_size else torch.full_like(second, highest + 1)
    return -within.clamp(max=highest + 1), within.clamp(max=highest)


def rounded_weight(recipe: Recipe, weight: Tensor) -> Tensor:
    """float32 [n, k]: the weight rounded by the recipe and dequantized, `q * scale` (`* second scale`).

    Rows with NaN or infinity become NaN.
    """
    room = _Rows.empty(recipe, len(weight), packed=False)
    if room.make(recipe, rows_of(weight)) >= 0:
        finite = torch.isfinite(weight).all(1, keepdim=True)
        return torch.where(finite, rounded_weight(recipe, torch.where(finite, weight, 0)), torch.nan)
    q, scale, second = (torch.from_numpy(array) for array in (room.codes, room.scale, room.second))
    codes = q * second.repeat_interleave(recipe.group_size, 1) if second.shape[1] else q
    return codes * scale.unsqueeze(1)


def _observed(recipe: Recipe) -> ActivationRange:
    if recipe.activation is None:
        raise FxquantError(recipe.module, "has a static scheme, but no observed input range.", "Calibrate first.")
    return recipe.activation


def _static(
    recipe: Recipe, observed: ActivationRange, sums: Tensor, scale: Tensor, bias: Tensor | None
) -> dict[str, Tensor]:
    stored = tensor_specs(recipe)["input_scale"].dtype
    input_scale, input_offset = (value.to(recipe.dtype).view(1) for value in static_parameters(observed))
    deq_scale, quant_bias = fused_parameters(sums, scale, input_scale, input_offset, bias)
    if quant_bias.abs().max() > torch.iinfo(torch.int32).max:
        fact = f"its bias is {quant_bias.abs().max():.3g} steps of input_scale * weight_scale, more than int32 holds."
        raise FxquantError(recipe.module, fact, "Use W8A8_DYNAMIC for it, or calibrate on text that activates it.")
    return {
        "input_scale": input_scale.to(stored),
        "input_offset": input_offset.to(stored),
        "deq_scale": encode_deq_scale(deq_scale, recipe.dtype),
        "quant_bias": quant_bias.to(torch.int32),
    }
