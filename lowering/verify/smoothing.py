"""Smoothing changes numbers and no function: what was divided on one side is multiplied on the other."""

import torch
from torch import Tensor

from fxquant.checkpoint import Checkpoint
from fxquant.lowering.verify.report import Check
from fxquant.smoothing import Smoothing


def check_smoothing(source: Checkpoint, smoothing: Smoothing) -> Check:
    """Every smoothed vector recomputed from the untouched `source`, `==`, and every scale on both its sides."""
    check = Check("smoothing keeps the function", len(smoothing.tensors) + len(smoothing.scales))
    read = set(smoothing.columns.values())
    for key in sorted(smoothing.scales):
        made = key in smoothing.rows or key in smoothing.tensors
        check.expect(made and key in read, f"{key}: its scale is on one side only")
    for name, found in sorted(smoothing.tensors.items()):
        check.expect(_agrees(found, _wanted(name, source, smoothing)), f"{name}: does not make up for scale and shift")
    return check


def _wanted(name: str, source: Checkpoint, smoothing: Smoothing) -> Tensor:
    """The vector that stands in the place of tensor `name`, float64 before its rounding where it is a sum."""
    module, _, suffix = name.rpartition(".")
    weight = f"{module}.weight"
    before = source.read(name) if name in source.tensors else torch.zeros(())
    if suffix == "weight":
        return (before.float() / smoothing.scales[name]).to(before.dtype)
    if weight in smoothing.scales:  # of a norm
        return (before.float() - smoothing.shifts.get(weight, torch.zeros(()))) / smoothing.scales[weight]
    shift = smoothing.shifts.get(smoothing.columns.get(weight, ""))
    return before.double() if shift is None else before.double() + source.read(weight).double() @ shift.double()


def _agrees(found: Tensor, wanted: Tensor) -> bool:
    """Equal, or for a sum in float64 within the rounding to the dtype of `found`, which halves may send either way."""
    if wanted.dtype is found.dtype:
        return bool((found == wanted).all())
    error, step = (found.double() - wanted).abs(), torch.finfo(found.dtype).eps
    return bool((error <= wanted.abs() * step).all())
