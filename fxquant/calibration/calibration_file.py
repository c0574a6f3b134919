"""calibration.safetensors: observed input ranges of static linears, before any statistic, and smoothing transforms.

The only part of an output that depends on the order of floating-point sums. Given this file, everything else is the
same on any machine.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from fxquant.calibration.batches import Batch
from fxquant.errors import FxquantError
from fxquant.policy.smooth_rules import SmoothMethod
from fxquant.program.program import Pair, Program
from fxquant.program.program_file import recipe_arguments
from fxquant.schemes.schemes import Recipe
from fxquant.storage.hashing import hash_text
from fxquant.storage.safetensors import NAMES, build_header, read_header, read_metadata
from fxquant.transforms.transforms_file import read_transforms, transform_metadata, transform_tensors
from fxquant.transforms.weight_transforms import WeightTransforms

CALIBRATION = "optional/calibration.safetensors"
"""Path within an output. Files that no engine loads are in `optional/`, as engines load every weight file beside it."""
TOKENS, LOW, HIGH, EXPERTS = "tokens", ".input_low", ".input_high", ".expert_tokens"
AGAIN = "Calibrate again: pass --calib TEXT instead."


@dataclass(frozen=True)
class Seen:
    """Provenance of observed ranges.

    graph      structural hash of the float graph
    weights    "float", or "rounded" and the hash of the recipes; scales of smoothing are those of float weights
    text       XXH3-128 of the batches of token ids
    smooth     hash of smoothing and rotation, "" for none
    statistic  the statistic of each input: "extremes", "percentile 99.99" or "histogram"
    """

    graph: str
    weights: str
    text: str
    smooth: str = ""
    statistic: str = "extremes"


@dataclass(frozen=True)
class Calibration:
    """Observed ranges.

    tokens      int64 [batches]: tokens per batch, without padding
    ranges      module → smallest and largest input per batch, float32 [batches] each, or [1] for all batches
    experts     routing module → int64 [E]: tokens routed to each expert, over all batches
    transforms  transforms that were applied before observing
    """

    seen: Seen
    tokens: Tensor
    ranges: dict[str, tuple[Tensor, Tensor]]
    experts: dict[str, Tensor] = field(default_factory=dict)
    transforms: WeightTransforms = field(default_factory=WeightTransforms)

    def save(self, path: Path) -> None:
        """Write the file; equal calibrations give equal bytes."""
        tensors = {TOKENS: self.tokens}
        for module, (low, high) in sorted(self.ranges.items()):
            tensors |= {module + LOW: low, module + HIGH: high}
        tensors |= {module + EXPERTS: counts for module, counts in sorted(self.experts.items())}
        tensors |= transform_tensors(self.transforms)
        tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
        entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        header, _ = build_header(entries, metadata=vars(self.seen) | transform_metadata(self.transforms))
        data = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
        path.parent.mkdir(exist_ok=True)
        whole = path.with_name(path.name + ".new")
        whole.write_bytes(header + data)
        whole.replace(path)  # atomic: a kill leaves all of it or nothing


def load_calibration(path: Path) -> Calibration:
    """Load a file written by `Calibration.save`. Raises FxquantError for any other."""
    if not path.is_file():
        raise FxquantError(path, "no such file.", "Pass the calibration.safetensors of an output.")
    infos, metadata = read_header(path), read_metadata(path)
    try:
        seen = Seen(*(metadata[key] for key in ("graph", "weights", "text", "smooth", "statistic")))
        modules = [name.removesuffix(LOW) for name in infos if name.endswith(LOW)]
        ranges = {module: (infos[module + LOW].read(), infos[module + HIGH].read()) for module in modules}
        tokens, transforms = infos[TOKENS].read(), read_transforms(path, infos, metadata)
        experts = {name.removesuffix(EXPERTS): infos[name].read() for name in infos if name.endswith(EXPERTS)}
    except KeyError as error:
        raise FxquantError(path, f"not a calibration file: it has no {error.args[0]}.", AGAIN) from None
    values = tuple(tokens.shape) if seen.statistic == Seen.statistic else (1,)
    shapes = {tuple(tensor.shape) for pair in ranges.values() for tensor in pair} | {values}
    dtypes = {tensor.dtype for pair in ranges.values() for tensor in pair} | {torch.float32}
    if (
        len(shapes) != 1
        or len(dtypes) != 1
        or tokens.dtype is not torch.int64
        or tokens.ndim != 1
        or (ranges and not len(tokens))
    ):
        raise FxquantError(path, "not a calibration file: its tensors do not have one value per batch.", AGAIN)
    if not all(torch.isfinite(tensor).all() for pair in ranges.values() for tensor in pair):
        raise FxquantError(path, "holds NaN or infinity.", AGAIN)
    if not all((low <= high).all() for low, high in ranges.values()):
        raise FxquantError(path, "not a calibration file: a minimum is above its maximum.", AGAIN)
    if not all(counts.dtype is torch.int64 and counts.ndim == 1 and (counts >= 0).all() for counts in experts.values()):
        raise FxquantError(path, "not a calibration file: its expert tokens are not counts.", AGAIN)
    return Calibration(seen, tokens, ranges, experts, transforms)


def earlier_calibrations(folders: Iterable[Path]) -> list[Calibration]:
    """The calibrations in output folders; missing and unreadable ones are skipped."""
    calibrations = []
    for path in (folder / CALIBRATION for folder in folders):
        with suppress(FxquantError):
            calibrations.append(load_calibration(path))
    return calibrations


def text_hash(batches: Iterable[Batch]) -> str:
    """XXH3-128 over shape, ids and mask of each batch, in hex; padding ids count as 0."""
    digest = xxhash.xxh3_128()
    for batch in batches:
        ids, mask = batch.ids * batch.mask, batch.mask.contiguous()
        digest.update(str(tuple(ids.shape)).encode() + ids.numpy().tobytes() + mask.numpy().tobytes())
    return digest.hexdigest()


def pairs_hash(program: Program) -> str:
    """The value of `Seen.smooth`: a hash of a program's pairs, its rotations, and the schemes of scale searches."""
    pairs = [(pair.kind.value, pair.maker, _consumers(program, pair), _rule(pair)) for pair in program.pairs]
    what: list[Any] = [pairs, sorted(program.added)] if pairs or program.added else []
    what += [sorted(program.rotations.items())] if program.rotations else []
    return hash_text(repr(tuple(what))) if what else ""


def _consumers(program: Program, pair: Pair) -> list[tuple[str, Any]]:
    """The weights that determine a pair's scales, with their schemes if the scales are searched."""
    recipes = ((target, program.recipes.get(program.parameters[target].module)) for target in pair.consumers)
    searched = pair.rule.method is SmoothMethod.FLEX
    return [(target, _scheme(recipe) if recipe and searched else recipe is not None) for target, recipe in recipes]


def _scheme(recipe: Recipe) -> tuple[str, int, str]:
    return recipe.scheme.value, recipe.group_size, NAMES[recipe.scale_dtype]


def _rule(pair: Pair) -> tuple[str, float]:
    return pair.rule.method.value, pair.rule.alpha


def rounded_by(program: Program) -> str:
    """The value of `Seen.weights` for ranges observed on rounded weights."""
    recipes = program.recipes | (program.mtp.recipes if program.mtp.static else {})
    arguments = [(module, recipe_arguments(recipe)) for module, recipe in sorted(recipes.items())]
    smoothed = ["pairs smoothed in float"] if program.pairs else []
    return f"rounded {hash_text(repr(arguments + smoothed))}"
