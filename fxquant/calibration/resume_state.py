"""state.safetensors: everything that a calibration needs to resume after a block, with a digest."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from fxquant.errors import FxquantError, StoppedError
from fxquant.storage.safetensors import NAMES, build_header, read_header, read_metadata
from fxquant.transforms.transforms_file import read_transforms, transform_metadata, transform_tensors
from fxquant.transforms.weight_transforms import WeightTransforms

VALUE, LOW, HIGH, EXPERTS = "value/", "low/", "high/", "experts/"
DISCARD = "Pass --restart to discard it."
Key = dict[str, str]
"""The inputs that determine a state; it is useless under any other key."""


@dataclass(frozen=True)
class State:
    """A calibration after its first `blocks` blocks.

    values      live node → its value per batch: a tensor, or a tuple of tensors
    ranges      node → smallest and largest value per batch, float32 [batches] each
    experts     routing module → int64 [E]: tokens routed to each expert
    transforms  transforms so far
    """

    blocks: int
    values: dict[str, list[Any]]
    ranges: dict[str, tuple[Tensor, Tensor]]
    experts: dict[str, Tensor]
    transforms: WeightTransforms

    def tensors(self) -> dict[str, Tensor]:
        """Name in the file → tensor. Values: `value/<node>/<batch>`, tuple items `value/<node>/<batch>/<item>`."""
        tensors = {
            f"{VALUE}{node}/{name}": tensor for node, values in self.values.items() for name, tensor in _flat(values)
        }
        for node, (low, high) in self.ranges.items():
            tensors |= {LOW + node: low, HIGH + node: high}
        tensors |= {EXPERTS + module: counts for module, counts in self.experts.items()}
        return tensors | transform_tensors(self.transforms)


def save_state(state: State, path: Path, key: Key) -> bool:
    """Replace the previous file atomically. False if the format lacks the dtype of a value."""
    tensors = dict(sorted(state.tensors().items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    if any(tensor.dtype not in NAMES for tensor in tensors.values()):
        return False
    metadata = key | {"blocks": str(state.blocks)} | transform_metadata(state.transforms)
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    header, _ = build_header(entries, metadata=metadata | {"digest": _digest(tensors, metadata)})
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            file.write(header)
            for tensor in tensors.values():
                file.write(_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut could leave the name without the data
        new.replace(path)  # atomic: a kill leaves the previous state or this one
    except OSError as error:
        raise StoppedError(new, f"{error.strerror or error}.", "Free space or repair the disk.") from None
    return True


def load_key(path: Path) -> Key:
    """The key and other metadata of a state. Raises FxquantError if the file is not a state."""
    try:
        read_header(path)
        return read_metadata(path)
    except (FxquantError, OSError) as error:
        fact = error.fact if isinstance(error, FxquantError) else f"{error.strerror}."
        raise FxquantError(path, f"unfinished calibration cannot be read: {fact}", DISCARD) from None


def load_state(path: Path) -> State:
    """The state written by `save_state`. Raises FxquantError if a single bit differs."""
    metadata, infos = load_key(path), read_header(path)
    tensors = {name: info.read().clone() for name, info in infos.items()}
    # cloned, tensors get torch's own alignment, which may change the order of sums
    written = {name: value for name, value in metadata.items() if name not in ("digest", "format")}
    if metadata.get("digest") != _digest(tensors, written):
        raise FxquantError(path, "unfinished calibration is damaged.", DISCARD)
    transforms = read_transforms(path, infos, metadata)
    try:
        blocks = int(metadata["blocks"])
        ranges = {name: (low, tensors[HIGH + name]) for name, low in _under(tensors, LOW).items()}
        values = _values(tensors)
    except (KeyError, ValueError) as error:
        raise FxquantError(path, f"not an unfinished calibration: {error!r:.200}.", DISCARD) from None
    return State(blocks, values, ranges, _under(tensors, EXPERTS), transforms)


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """XXH3-128 over names, dtypes, shapes and bytes of all tensors, and over the metadata."""
    digest = xxhash.xxh3_128(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _flat(values: list[Any]) -> Iterator[tuple[str, Tensor]]:
    for batch, value in enumerate(values):
        if isinstance(value, Tensor):
            yield str(batch), value
        else:
            yield from ((f"{batch}/{item}", tensor) for item, tensor in enumerate(value))


def _values(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Node → value per batch, reassembled from tensors."""
    parts: dict[str, dict[int, dict[int, Tensor]]] = {}
    for name, tensor in _under(tensors, VALUE).items():
        node, batch, *item = name.split("/")
        parts.setdefault(node, {}).setdefault(int(batch), {})[int(item[0]) if item else -1] = tensor
    return {
        node: [
            items[-1] if -1 in items else tuple(items[i] for i in sorted(items))
            for _, items in sorted(items_of.items())
        ]
        for node, items_of in parts.items()
    }


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
