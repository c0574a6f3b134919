"""Transforms file: a `Smoothing` in safetensors, vectors under prefixed names, their assignment in the metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import FxquantError
from fxquant.inputs.json_file import parse_json
from fxquant.storage.safetensors import TensorInfo
from fxquant.transforms.rotation import Turn
from fxquant.transforms.weight_transforms import Smoothing

SCALES, SHIFTS, TENSORS, NORMS = "smooth_scale/", "smooth_shift/", "smoothed/", "rotation_norm/"
AGAIN = "Calibrate again: pass --calib TEXT instead."


def smoothing_tensors(smoothing: Smoothing) -> dict[str, Tensor]:
    """Name in the file → vector."""
    groups = {SCALES: smoothing.scales, SHIFTS: smoothing.shifts, TENSORS: smoothing.tensors, NORMS: smoothing.norms}
    return {prefix + name: tensor for prefix, tensors in groups.items() for name, tensor in tensors.items()}


def smoothing_metadata(smoothing: Smoothing) -> dict[str, str]:
    """`columns`, `rows` and `turns` as JSON; empty without transforms."""
    if not smoothing:
        return {}
    turns = {name: asdict(turn) for name, turn in smoothing.turns.items()}
    metadata = {"columns": _json(smoothing.columns), "rows": _json(smoothing.rows)}
    return metadata | ({"turns": _json(turns)} if turns else {})


def _json(names: Mapping[str, Any]) -> str:
    return json.dumps(dict(sorted(names.items())), separators=(",", ":"))


def read_smoothing(path: Path, infos: Mapping[str, TensorInfo], metadata: dict[str, str]) -> Smoothing:
    """The `Smoothing` in the file at `path`. Raises FxquantError if it is not valid."""
    groups = [
        {name.removeprefix(prefix): info.read() for name, info in infos.items() if name.startswith(prefix)}
        for prefix in (SCALES, SHIFTS, TENSORS, NORMS)
    ]
    try:
        columns, rows, turns = (
            parse_json(metadata.get(key, "{}"), path, AGAIN) for key in ("columns", "rows", "turns")
        )
        rotations = {name: Turn(**turn) for name, turn in turns.items()}
        if not all(isinstance(name, str) for name in columns.values()):
            raise TypeError
        smoothing = Smoothing(groups[0], dict(columns), dict(rows), groups[1], groups[2], rotations, groups[3])
    except (ValueError, TypeError, AttributeError):
        raise FxquantError(path, "its metadata of smoothing is not valid.", AGAIN) from None
    _check(path, smoothing)
    return smoothing


def _check(path: Path, smoothing: Smoothing) -> None:
    for name, scale in smoothing.scales.items():
        if scale.dtype is not torch.float32 or scale.ndim != 1 or not bool((scale > 0).all() & scale.isfinite().all()):
            raise FxquantError(path, f"smoothing scale of {name} is not a vector of positive float32 numbers.", AGAIN)
    for key in {*smoothing.columns.values(), *smoothing.rows}:
        if key not in smoothing.scales:
            raise FxquantError(path, f"has no smoothing scale {key}.", AGAIN)
    for key, heads in smoothing.rows.items():
        if type(heads) is not int or heads < 1 or len(smoothing.scales[key]) % heads:
            raise FxquantError(path, f"smoothing scale of {key} does not split into {heads} heads.", AGAIN)
    for name, turn in smoothing.turns.items():
        sizes = (turn.columns, turn.heads, turn.values)
        if not all(type(size) is int and size >= 0 for size in sizes) or turn.norm not in {"", *smoothing.norms}:
            raise FxquantError(path, f"invalid rotation of {name}: {turn}.", AGAIN)
    for name, tensor in (smoothing.tensors | smoothing.norms).items():
        if tensor.ndim != 1 or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise FxquantError(path, f"smoothed {name} is not a vector of finite floats.", AGAIN)
