"""state.safetensors: all that a calibration needs to go on after a block, with a digest over it."""

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
from fxquant.transforms.transforms_file import read_smoothing, smoothing_metadata, smoothing_tensors
from fxquant.transforms.weight_transforms import Smoothing

VALUE, LOW, HIGH, EXPERTS = "value/", "low/", "high/", "experts/"
DISCARD = "Pass --restart to discard it."
Key = dict[str, str]
"""What a state depends on; nothing in it is of use under another key."""


@dataclass(frozen=True)
class State:
    """A calibration after its first `blocks` blocks.

    values     node → its value for each batch: a tensor, or a tuple of tensors
    ranges     node → smallest and largest value in each batch, float32 [batches] each
    experts    module that routes → int64 [E]: tokens that went to each expert
    smoothing  what was smoothed so far
    """

    blocks: int
    values: dict[str, list[Any]]
    ranges: dict[str, tuple[Tensor, Tensor]]
    experts: dict[str, Tensor]
    smoothing: Smoothing

    def tensors(self) -> dict[str, Tensor]:
        """Name in the file → tensor. A value is `value/<node>/<batch>`; of a tuple, `value/<node>/<batch>/<item>`."""
        found = {f"{VALUE}{node}/{name}": one for node, values in self.values.items() for name, one in _flat(values)}
        for node, (low, high) in self.ranges.items():
            found |= {LOW + node: low, HIGH + node: high}
        found |= {EXPERTS + module: counts for module, counts in self.experts.items()}
        return found | smoothing_tensors(self.smoothing)


def save_state(state: State, path: Path, key: Key) -> bool:
    """Put the file, whole, in the place of the last one. False where a value's dtype has no name in such a file."""
    tensors = dict(sorted(state.tensors().items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    if any(tensor.dtype not in NAMES for tensor in tensors.values()):
        return False
    metadata = key | {"blocks": str(state.blocks)} | smoothing_metadata(state.smoothing)
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    header, _ = build_header(entries, metadata=metadata | {"digest": _digest(tensors, metadata)})
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            file.write(header)
            for tensor in tensors.values():
                file.write(_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)  # a kill leaves the last one or this one
    except OSError as error:
        raise StoppedError(new, f"{error.strerror or error}.", "Free space or repair the disk.") from None
    return True


def load_key(path: Path) -> Key:
    """The key of a state, and what else its metadata says. Raises FxquantError for a file that is none."""
    try:
        read_header(path)
        return read_metadata(path)
    except (FxquantError, OSError) as error:
        fact = error.fact if isinstance(error, FxquantError) else f"{error.strerror}."
        raise FxquantError(path, f"unfinished calibration that can't be read: {fact}", DISCARD) from None


def load_state(path: Path) -> State:
    """What `save_state` wrote. Raises FxquantError where a bit of it is another."""
    metadata, infos = load_key(path), read_header(path)
    found = {name: info.read().clone() for name, info in infos.items()}
    # cloned, they are aligned like every tensor that torch makes: sums may follow the alignment
    written = {name: value for name, value in metadata.items() if name not in ("digest", "format")}
    if metadata.get("digest") != _digest(found, written):
        raise FxquantError(path, "unfinished calibration that is damaged.", DISCARD)
    smoothing = read_smoothing(path, infos, metadata)
    try:
        blocks = int(metadata["blocks"])
        ranges = {name: (low, found[HIGH + name]) for name, low in _under(found, LOW).items()}
        values = _values(found)
    except (KeyError, ValueError) as error:
        raise FxquantError(path, f"unfinished calibration that is none: {error!r:.200}.", DISCARD) from None
    return State(blocks, values, ranges, _under(found, EXPERTS), smoothing)


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
            yield from ((f"{batch}/{item}", one) for item, one in enumerate(value))


def _values(found: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Node → value for each batch, put together from tensors."""
    parts: dict[str, dict[int, dict[int, Tensor]]] = {}
    for name, tensor in _under(found, VALUE).items():
        node, batch, *item = name.split("/")
        parts.setdefault(node, {}).setdefault(int(batch), {})[int(item[0]) if item else -1] = tensor
    return {
        node: [items[-1] if -1 in items else tuple(items[i] for i in sorted(items)) for _, items in sorted(one.items())]
        for node, one in parts.items()
    }


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
