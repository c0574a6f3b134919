"""Transforms file: `WeightTransforms` in safetensors, vectors by prefixed names, their assignment in the metadata."""

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
from fxquant.transforms.rotation import Rotation
from fxquant.transforms.weight_transforms import WeightTransforms

SCALES, SHIFTS, TENSORS, NORMS = "smooth_scale/", "smooth_shift/", "transformed/", "rotation_norm/"
AGAIN = "Calibrate again: pass --calib TEXT instead."


def transform_tensors(transforms: WeightTransforms) -> dict[str, Tensor]:
    """Name in the file → vector."""
    groups = {
        SCALES: transforms.scales,
        SHIFTS: transforms.shifts,
        TENSORS: transforms.tensors,
        NORMS: transforms.norms,
    }
    return {prefix + name: tensor for prefix, tensors in groups.items() for name, tensor in tensors.items()}


def transform_metadata(transforms: WeightTransforms) -> dict[str, str]:
    """`columns`, `rows` and `rotations` as JSON; empty without transforms."""
    if not transforms:
        return {}
    rotations = {name: asdict(rotation) for name, rotation in transforms.rotations.items()}
    metadata = {"columns": _json(transforms.columns), "rows": _json(transforms.rows)}
    return metadata | ({"rotations": _json(rotations)} if rotations else {})


def _json(names: Mapping[str, Any]) -> str:
    return json.dumps(dict(sorted(names.items())), separators=(",", ":"))


def read_transforms(path: Path, infos: Mapping[str, TensorInfo], metadata: dict[str, str]) -> WeightTransforms:
    """The `WeightTransforms` in the file at `path`. Raises FxquantError if it is not valid."""
    groups = [
        {name.removeprefix(prefix): info.read() for name, info in infos.items() if name.startswith(prefix)}
        for prefix in (SCALES, SHIFTS, TENSORS, NORMS)
    ]
    try:
        columns, rows, fields = (
            parse_json(metadata.get(key, "{}"), path, AGAIN) for key in ("columns", "rows", "rotations")
        )
        rotations = {name: Rotation(**rotation) for name, rotation in fields.items()}
        if not all(isinstance(name, str) for name in columns.values()):
            raise TypeError
        transforms = WeightTransforms(groups[0], dict(columns), dict(rows), groups[1], groups[2], rotations, groups[3])
    except (ValueError, TypeError, AttributeError):
        raise FxquantError(path, "its metadata of smoothing is not valid.", AGAIN) from None
    _check(path, transforms)
    return transforms


def _check(path: Path, transforms: WeightTransforms) -> None:
    for name, scale in transforms.scales.items():
        if scale.dtype is not torch.float32 or scale.ndim != 1 or not bool((scale > 0).all() & scale.isfinite().all()):
            raise FxquantError(path, f"smoothing scale of {name} is not a vector of positive float32 numbers.", AGAIN)
    for key in {*transforms.columns.values(), *transforms.rows}:
        if key not in transforms.scales:
            raise FxquantError(path, f"has no smoothing scale {key}.", AGAIN)
    for key, heads in transforms.rows.items():
        if type(heads) is not int or heads < 1 or len(transforms.scales[key]) % heads:
            raise FxquantError(path, f"smoothing scale of {key} does not split into {heads} heads.", AGAIN)
    for name, rotation in transforms.rotations.items():
        sizes = (rotation.columns, rotation.heads, rotation.values)
        if not all(type(size) is int and size >= 0 for size in sizes) or rotation.norm not in {"", *transforms.norms}:
            raise FxquantError(path, f"invalid rotation of {name}: {rotation}.", AGAIN)
    for name, tensor in (transforms.tensors | transforms.norms).items():
        if tensor.ndim != 1 or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise FxquantError(path, f"transformed {name} is not a vector of finite floats.", AGAIN)
