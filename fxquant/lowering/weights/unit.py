"""Unit of work: what a worker makes in one step, and the places of its bytes in the weight files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fxquant.lowering.output_folder.layout import FileLayout, StoredTensor
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe
from fxquant.storage.sliced_tensor import Runs

LARGE = 64 << 20
"""Bytes from which a unit is scheduled early, so that no other worker waits for it at the end."""


@dataclass(frozen=True)
class Place:
    """Place of a tensor: absolute byte `offset` in `file`, a name within the output folder.

    runs  of a slice of a tensor of all experts, which begins at `offset`
    """

    file: str
    offset: int
    nbytes: int
    runs: Runs | None = None

    def ranges(self, start: int, length: int) -> Iterable[tuple[int, int]]:
        """Bytes `start` … `start + length` of the tensor: (absolute offset, number of bytes) of each part."""
        if self.runs is None:
            return [(self.offset + start, length)]
        return ((self.offset + offset, size) for offset, size in self.runs.ranges(start, length))


@dataclass(frozen=True)
class Unit:
    """All tensors of one module, made by its recipe, or one float tensor of the checkpoint.

    name          the module, or the tensor
    float_tensor  the float tensor, if there is no recipe
    places        role of each tensor ("" for a float one) → its place
    """

    name: str
    recipe: Recipe | None
    float_tensor: StoredTensor | None
    places: dict[str, Place]

    @property
    def nbytes(self) -> int:
        """Bytes of the output."""
        return sum(place.nbytes for place in self.places.values())

    def tensor_name(self, role: str) -> str:
        """The name in the weight file."""
        return tensor_name(self.name, role)


@dataclass(frozen=True)
class Filled:
    """A finished unit: the XXH3-128 of each tensor's bytes by role, in hex."""

    name: str
    digests: dict[str, str]


def units_of(files: Sequence[FileLayout]) -> list[Unit]:
    """Every unit of the planned files: large ones first, so that no worker is left with one at the end, the others by
    name, which is roughly their order in the source and in the files."""
    placed = (
        (part, Place(file.name, offset, part.nbytes, part.runs))
        for file in files
        for tensor, offset in zip(file.tensors, file.offsets, strict=True)
        for part in tensor.parts
    )
    return sorted(collect_units(placed), key=lambda unit: unit.nbytes < LARGE)


def collect_units(placed: Iterable[tuple[StoredTensor, Place]]) -> list[Unit]:
    """Tensors and their places → units, sorted by name."""
    places: dict[str, dict[str, Place]] = {}
    owners: dict[str, StoredTensor] = {}
    for tensor, place in placed:
        name = tensor.name if tensor.recipe is None else tensor.module
        places.setdefault(name, {})[tensor.role] = place
        owners.setdefault(name, tensor)
    return [_unit(name, owners[name], places[name]) for name in sorted(places)]


def _unit(name: str, owner: StoredTensor, places: dict[str, Place]) -> Unit:
    return Unit(name, owner.recipe, owner if owner.recipe is None else None, places)
