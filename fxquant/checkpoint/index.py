"""Index of a sharded checkpoint: which file holds which tensor, checked against the files' headers."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from fxquant.errors import FxquantError
from fxquant.inputs.json_file import read_json
from fxquant.inputs.limits import CHECKPOINT_TENSORS, FILE_NAME_BYTES, INDEX_BYTES
from fxquant.storage.safetensors import TensorInfo, check_names, read_header

SCALE_SUFFIX = "_scale_inv"
AGAIN = "Download or copy the checkpoint again."
SCALES = {SCALE_SUFFIX: "", ".scale": ".weight"}
"""Suffix of block scales, Hugging Face's and DeepSeek's → suffix of their weight."""


def indexed_tensors(folder: Path, index: Path) -> dict[str, TensorInfo]:
    """Every tensor of the files that `index` lists, sorted by name. Raises FxquantError if index and headers differ."""
    weight_map = _read_map(index)
    files = sorted(set(weight_map.values()))
    _check_files(folder, index, files)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        infos = read_header(folder / file)
        for name in sorted(infos.keys() & tensors.keys()):
            raise FxquantError(index, f"tensor {name} is in {tensors[name].file.name} and in {file}.", AGAIN)
        tensors.update(infos)
        _check_count(index, len(tensors))
    _check_names(index, weight_map, tensors)
    return dict(sorted(tensors.items()))


def _read_map(index: Path) -> dict[str, str]:
    document = read_json(index, INDEX_BYTES, AGAIN)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise FxquantError(index, "not a safetensors index: it has no weight_map of file names.", AGAIN)
    if not weight_map:
        raise FxquantError(index, "its weight_map is empty: not a safetensors index.", AGAIN)
    _check_count(index, len(weight_map))
    check_names(index, weight_map)
    return weight_map


def _check_count(index: Path, count: int) -> None:
    if count > CHECKPOINT_TENSORS:
        fact = f"{count:,} tensors, at most {CHECKPOINT_TENSORS:,} are read."
        raise FxquantError(index, fact, "fxquant compiles DeepSeek-V3 models, which have about 91 thousand.")


def _check_files(folder: Path, index: Path, files: list[str]) -> None:
    for file in files:
        # plain names only: a path could lead outside the folder
        plain = Path(file).name == file and file not in ("", "..") and file.isprintable()
        if plain and len(os.fsencode(file)) > FILE_NAME_BYTES:
            fact = f"weight_map names {file[:40]}…: {len(os.fsencode(file))} bytes, the limit is {FILE_NAME_BYTES}."
            raise FxquantError(index, fact, AGAIN)
        if not plain:
            fact = f"weight_map names files outside the folder, such as {file[:40]!a}."
            raise FxquantError(index, fact, "Do not use this checkpoint.")
        if Path(file).suffix != ".safetensors":
            fact = f"weight_map names {file}, which is not a .safetensors file."
            raise FxquantError(index, fact, "Use the index of the safetensors form of this checkpoint.")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        first = folder / missing[0]
        fact = "not a link to a file" if first.is_symlink() else "not a file" if first.exists() else "missing shard"
        raise FxquantError(first, f"{fact} ({len(missing)} of {len(files)}).", AGAIN)


def _check_names(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    absent = sorted(set(weight_map) - set(tensors))
    stale = [name for name in absent if _scales_a_float(name, tensors)]
    if absent and stale == absent:
        fact = (
            f"lists {len(stale)} block scales that no file holds, such as {stale[0]}; their weights are not FP8. "
            "The checkpoint was cast to another dtype, but its index is still the old one."
        )
        raise FxquantError(index, fact, "Remove the names of scales from its weight_map. No weight is missing.")
    for name in sorted(set(tensors) - set(weight_map)):
        fact = (
            f"tensor {name} is in a shard but not in the index: {tensors[name].file.name} belongs to another version."
        )
        raise FxquantError(index, fact, AGAIN)
    for name in absent if not stale else [name for name in absent if name not in stale]:
        raise FxquantError(index, f"tensor {name} is not in {weight_map[name]}.", AGAIN)
    for name, info in tensors.items():
        if info.file.name != weight_map[name]:
            raise FxquantError(index, f"tensor {name} is in {info.file.name}, not {weight_map[name]}.", AGAIN)


def _scales_a_float(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether `name` names block scales of a stored weight that is not FP8."""
    weights = (tensors.get(name.removesuffix(end) + weight) for end, weight in SCALES.items() if name.endswith(end))
    return any(weight is not None and weight.dtype is not torch.float8_e4m3fn for weight in weights)
