"""Module check: the stored tensors of a quantized linear against the slow reference, a block of rows at a time."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.ops.quantized import expand_int4
from fxquant.program.program import Program
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe, WeightAlgorithm, tensor_specs
from fxquant.storage.hashing import hash_bytes
from fxquant.verification.reference import (
    codes_along_k,
    contradiction,
    expected_codes,
    expected_tensors,
    wrong_codes,
)
from fxquant.verification.report import Check
from fxquant.verification.stored_rows import StoredRows, source_rows

PAIR = 2
"""Rows of int4 codes that share a byte."""


class ModuleCheck:
    """One module of a recipe in `files`, made again from `source`."""

    def __init__(self, recipe: Recipe, module: str, files: WeightFiles, source: Checkpoint) -> None:
        self._recipe, self._module, self._files, self._source = recipe, module, files, source
        self._weight = tensor_name(module, "weight")
        self._bias = source.read(tensor_name(module, "bias")) if recipe.bias else None

    def chosen(self, rows: int | None) -> list[int] | None:
        """First rows of pairs, so many rows in all, at random by the module's name; None where all are checked: a
        search takes long, and no other part does."""
        recipe = self._recipe
        pairs = recipe.out_features // PAIR
        searched = recipe.algorithm.scales is not WeightAlgorithm.MIN_MAX
        if rows is None or not searched or recipe.out_features % PAIR or rows >= recipe.out_features:
            return None
        return [PAIR * pair for pair in sorted(random.Random(self._module).sample(range(pairs), rows // PAIR))]

    def check(self, chosen: list[int] | None, quantized: Check, calibrated: Check) -> None:
        """The tensors of all rows, or of the pairs of rows that begin at `chosen`."""
        recipe, module = self._recipe, self._module
        solved = stored_codes(recipe, module, self._files) if recipe.algorithm.from_inputs else None
        stored: dict[str, StoredRows] = {}
        reasons, all_scales = [], []
        for start, rows in self._blocks(chosen):
            own = slice(start, start + len(rows))
            searched = expected_codes(recipe, rows)
            codes, bias = (None if whole is None else whole[own] for whole in (solved, self._bias))
            if codes is not None:
                reasons.append(wrong_codes(recipe, rows, codes, searched, start))
            for role, want in expected_tensors(recipe, rows, bias, codes, searched).items():
                compared = stored.setdefault(role, StoredRows(self._files.tensors[tensor_name(module, role)]))
                compared.add(want, start * len(want) // len(rows))
            all_scales.append(searched[1])
        if solved is not None:
            reason = next(filter(None, reasons), None)
            quantized.expect(reason is None, f"{self._weight}: {reason}")
            quantized.checked -= 1  # of no tensor in the total
        for role, compared in stored.items():
            quantized.expect(compared.same, f"{tensor_name(module, role)}: {compared.fact()}")
        if recipe.scheme.static:
            parameters = stored_parameters(recipe, module, self._files)
            own_rows = None if chosen is None else [start + row for start in chosen for row in range(PAIR)]
            reason = contradiction(recipe, parameters, self._bias, torch.cat(all_scales), own_rows)
            calibrated.expect(reason is None, f"{module}.{reason}")

    def _blocks(self, chosen: list[int] | None) -> Iterator[tuple[int, Tensor]]:
        if chosen is None:
            yield from source_rows(self._source, self._weight)
        elif self._source.transforms.mixes_rows(self._weight):
            whole = self._source.read(self._weight)
            yield from ((start, whole[start : start + PAIR]) for start in chosen)
        else:
            yield from ((start, self._source.read_rows(self._weight, start, start + PAIR)) for start in chosen)


def stored_parameters(recipe: Recipe, module: str, files: WeightFiles) -> dict[str, Tensor]:
    """Role → tensor, of one of the recipe's modules."""
    return {role: files.read(tensor_name(module, role)) for role in tensor_specs(recipe)}


class StoredCodes:
    """The codes of every quantized module of a folder, from its weight files: no source has those of GPTQ."""

    def __init__(self, program: Program, files: WeightFiles) -> None:
        self._recipes = {module: recipe for recipe in program.recipes.values() for module in recipe.modules}
        self._files = files

    def __call__(self, module: str) -> Tensor:
        return stored_codes(self._recipes[module], module, self._files)

    def digest(self, module: str) -> str:
        """XXH3-128 of the module's codes, in hex."""
        return hash_bytes(self(module).numpy().tobytes())


def stored_codes(recipe: Recipe, module: str, files: WeightFiles) -> Tensor:
    """int8 [n, k], unpacked."""
    weight = files.read(tensor_name(module, "weight"))
    if weight.dtype is torch.uint8:
        return codes_along_k(weight)
    return expand_int4(weight, None) if recipe.int4 and recipe.weight_format.packed else weight
