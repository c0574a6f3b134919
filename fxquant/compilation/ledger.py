"""Ledger of source tensors: every parameter has its tensors in the checkpoint, every tensor ends in one bucket."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.inputs.limits import MTP_LAYERS
from fxquant.policy.policy import LEAVE_OUT, Rule
from fxquant.program.program import Program, made_parameters
from fxquant.program.rotary_buffers import REASON, stored_frequencies
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Scheme

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


class Bucket(StrEnum):
    """What became of a checkpoint tensor."""

    REWRITTEN = "rewritten"
    KEPT = "kept"
    LEFT_OUT = "left out"
    CONSUMED = "consumed"


@dataclass(frozen=True)
class Entry:
    """One checkpoint tensor; `why` is the scheme, the rule, or the tensor that consumed it."""

    name: str
    bucket: Bucket
    why: str
    nbytes: int


@dataclass(frozen=True)
class Ledger:
    """Every tensor of a checkpoint, sorted by name."""

    entries: tuple[Entry, ...]

    def totals(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(bucket, why) → (tensors, bytes); all consumed scales share one key."""
        totals: dict[tuple[str, str], tuple[int, int]] = {}
        for entry in self.entries:
            why = "FP8 block scales, into their weights" if entry.bucket is Bucket.CONSUMED else entry.why
            count, nbytes = totals.get((entry.bucket.value, why), (0, 0))
            totals[entry.bucket.value, why] = (count + 1, nbytes + entry.nbytes)
        return totals

    def as_json(self) -> dict[str, Any]:
        """Totals per bucket, and every entry."""
        totals = [
            {"bucket": bucket, "why": why, "tensors": count, "bytes": nbytes}
            for (bucket, why), (count, nbytes) in sorted(self.totals().items())
        ]
        return {"totals": totals, "tensors": [asdict(entry) for entry in self.entries]}


def check_parameters(program: Program, checkpoint: Checkpoint) -> None:
    """Raise FxquantError unless the checkpoint has every tensor that the graph or a recipe needs, in shape and float.

    Works for a program before and after its rewrite.
    """
    for name, shape in _needed(program):
        info = checkpoint.tensors.get(name)
        if info is None:
            way_out = "Check config.json against the weights, or the model's parameter names."
            raise FxquantError(checkpoint.folder, f"tensor {name} is missing.", way_out)
        if info.shape != shape:
            fact = f"tensor {name} is {list(info.shape)}, the model needs {list(shape)}."
            raise FxquantError(info.file, fact, "Check config.json against the weights.")
        if info.dtype not in FLOATS:
            fact = f"tensor {name} is {info.dtype}: already quantized?"
            raise FxquantError(info.file, fact, "fxquant compiles float and official FP8 checkpoints.")


def _needed(program: Program) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Source tensor → shape."""
    for recipe in program.recipes.values():
        for module in recipe.modules:
            yield tensor_name(module, "weight"), (recipe.out_features, recipe.in_features)
            if recipe.bias:
                yield tensor_name(module, "bias"), (recipe.out_features,)
    quantized = {target for recipe in program.recipes.values() for target in made_parameters(recipe)}
    for target, parameter in program.parameters.items():
        shape = tuple(program.graph.tensor(target).shape)
        for name in parameter.names if target not in quantized else ():  # recipes make the others from source tensors
            yield name, shape[1:] if parameter.stacked else shape


def mtp_modules(checkpoint: Checkpoint, modules: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the model's multi-token prediction `modules` for which the checkpoint has tensors."""
    return tuple(m for m in modules if any(name.startswith(m + ".") for name in checkpoint.tensors))


def build_ledger(program: Program, checkpoint: Checkpoint) -> Ledger:
    """Sort every tensor into its bucket. Raises FxquantError for a tensor that belongs nowhere."""
    homes: dict[str, tuple[Bucket, str]] = {}
    mtp = program.mtp.layers
    for recipe in program.recipes.values():
        homes |= dict.fromkeys(recipe.source_names, (Bucket.REWRITTEN, recipe.scheme.value))
    for name, parameter in program.float_names().items():
        homes[name] = (Bucket.KEPT, str(program.rules[parameter.module]))
    for recipe in program.mtp.recipes.values():
        homes |= dict.fromkeys(recipe.source_names, (Bucket.REWRITTEN, recipe.scheme.value))
    for name in program.mtp.float_tensors:
        homes[name] = (Bucket.KEPT, _kept_of_mtp(program.rules[_mtp_of(name, mtp)]))
    for name in stored_frequencies(program, checkpoint):
        homes[name] = (Bucket.LEFT_OUT, REASON)
    entries = [_entry(program, checkpoint, name, homes, mtp) for name in sorted(checkpoint.tensors)]
    for name, scale in checkpoint.scales.items():
        if name in homes:
            entries.append(Entry(scale.name, Bucket.CONSUMED, name, scale.nbytes))
        else:
            entries.append(Entry(scale.name, Bucket.LEFT_OUT, str(program.rules[_mtp_of(name, mtp)]), scale.nbytes))
    return Ledger(tuple(sorted(entries, key=lambda entry: entry.name)))


def _entry(
    program: Program, checkpoint: Checkpoint, name: str, homes: dict[str, tuple[Bucket, str]], mtp: tuple[str, ...]
) -> Entry:
    nbytes = checkpoint.tensors[name].nbytes
    if name in homes:
        return Entry(name, *homes[name], nbytes)
    module = _mtp_of(name, mtp)
    rule = program.rules.get(module)
    if rule is not None and rule.scheme == LEAVE_OUT:
        return Entry(name, Bucket.LEFT_OUT, str(rule), nbytes)
    fact = f"tensor {name} belongs to no parameter of the model."
    raise FxquantError(checkpoint.tensors[name].file, fact, _homeless(name, program.config))


def _homeless(name: str, config: dict[str, Any]) -> str:
    """What to do about a tensor that belongs nowhere."""
    layers, announced = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers", 1)
    if isinstance(layers, int) and any(name.startswith(f"model.layers.{layers + more}.") for more in range(MTP_LAYERS)):
        said = f"config.json says num_hidden_layers: {layers} and num_nextn_predict_layers: {announced}"
        return f"{said}. If the tensor is part of a prediction layer, raise the latter; else check the former."
    return "Check config.json, or add it to the model's forward."


def _kept_of_mtp(rule: Rule) -> str:
    return str(rule) if rule.scheme == Scheme.FLOAT else f"{rule}, not a linear of a decoder layer"


def _mtp_of(name: str, mtp: tuple[str, ...]) -> str:
    return next((module for module in mtp if name.startswith(module + ".")), "")
