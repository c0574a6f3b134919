"""Transform checks: smoothing and rotation keep the model's function. A value divided on one side is multiplied on the
other; one rotated on one side is rotated back on the other."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxquant.calibration.calibration_file import CALIBRATION
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.rotated import rotation_transforms
from fxquant.lowering.output_folder.rotation_file import FILE as ROTATION_FILE
from fxquant.lowering.output_folder.rotation_file import TENSOR, rotation_rows
from fxquant.passes.find_rotation import find_rotations
from fxquant.program.program import Program
from fxquant.schemes.roles import module_and_role, tensor_name
from fxquant.transforms.rotation import Rotate
from fxquant.transforms.weight_transforms import WeightTransforms
from fxquant.verification.report import Check


def check_smoothing(source: Checkpoint, transforms: WeightTransforms) -> Check:
    """Every smoothed vector `==` recomputed from `source`, rotated only, and every scale on both sides."""
    source = source.transformed(rotation_transforms(transforms.rotations, source))
    check = Check("smoothing keeps the function", len(transforms.tensors) + len(transforms.scales))
    read = set(transforms.columns.values())
    for key in sorted(transforms.scales):
        divided = key in transforms.rows or key in transforms.tensors
        check.expect(divided and key in read, f"{key}: its scale is on one side only")
    for name, tensor in sorted(transforms.tensors.items()):
        check.expect(
            _agrees(tensor, _expected(name, source, transforms)), f"{name}: does not compensate scale and shift"
        )
    return check


def check_rotation(program: Program, source: Checkpoint, transforms: WeightTransforms) -> Check:
    """The rotations are those that the float graph `program` needs, without missing a weight of a rotated value."""
    check = Check("rotation keeps the function", len(transforms.rotations) + len(transforms.norms))
    candidates = [
        find_rotations(program, parts) for count in range(1, 1 + len(Rotate)) for parts in combinations(Rotate, count)
    ]
    applied = transforms.rotations
    # an output does not say which parts its policy rotates
    closest = min(candidates, key=lambda rotations: len(set(applied.items()) ^ set(rotations.items())))
    for name in sorted({*applied, *closest}):
        same = applied.get(name) == closest.get(name)
        check.expect(same, f"{name}: rotated by {applied.get(name)}, the graph says {closest.get(name)}")
    for name, norm in transforms.norms.items():
        check.expect(name in source.tensors and torch.equal(norm, source.read(name)), f"{name}: not the source's")
    return check


def check_rotation_file(folder: Path, size: int) -> Check:
    """The matrix beside the weights is the one by which the residual stream, of `size` features, is rotated."""
    check = Check("rotation matrix == Q", 1)
    try:
        with safe_open(folder / ROTATION_FILE, "pt") as file:
            stored = file.get_slice(TENSOR)
            fits = list(file.keys()) == [TENSOR] and (stored.get_dtype(), stored.get_shape()) == ("F32", [size, size])
            start = 0
            for rows in rotation_rows(size) if fits else ():
                fits = fits and torch.equal(stored[start : start + len(rows)], rows)
                start += len(rows)
    except (OSError, SafetensorError):
        fits = False
    check.expect(fits, f"{ROTATION_FILE}: missing, or another matrix")
    return check


def check_calibration(folder: Path, values: Sequence[Check]) -> Check:
    """For a calibration file without a digest: whether `values`, the checks that read it, agree with it."""
    check = Check("weights fit the calibration", 1)
    there = (folder / CALIBRATION).is_file()
    fact = "contradicts the weights: one of them is damaged" if there else "missing, if weights are smoothed"
    check.expect(all(value_check.ok for value_check in values), f"{CALIBRATION}: {fact}")
    return check


def _expected(name: str, source: Checkpoint, transforms: WeightTransforms) -> Tensor:
    """The vector that replaces tensor `name`; a sum in float64, before its rounding."""
    module, role = module_and_role(name)
    weight = tensor_name(module, "weight")
    before = source.read(name) if name in source.tensors else torch.zeros(())
    if role == "weight" and name not in transforms.scales:
        return before
    if role == "weight":
        return (before.float() / transforms.scales[name]).to(before.dtype)
    if weight in transforms.scales:  # of a norm
        return (before.float() - transforms.shifts.get(weight, torch.zeros(()))) / transforms.scales[weight]
    shift = transforms.shifts.get(transforms.columns.get(weight, ""))
    return before.double() if shift is None else before.double() + source.read(weight).double() @ shift.double()


def _agrees(tensor: Tensor, expected: Tensor) -> bool:
    """Equal, or for a sum in float64 within the rounding to the dtype of `tensor`, where ties may go either way."""
    if expected.dtype is tensor.dtype:
        return bool((tensor == expected).all())
    error, step = (tensor.double() - expected).abs(), torch.finfo(tensor.dtype).eps
    return bool((error <= expected.abs() * step).all())
