"""Device on which calibration runs the float graph."""

from importlib.util import find_spec

import torch

from fxquant.errors import FxquantError

DEVICES = ("cpu", "cuda", "npu")


def open_device(name: str) -> torch.device:
    """The device of that name. Raises FxquantError if torch does not have it."""
    place = f"--device {name}"
    if name not in DEVICES:
        raise FxquantError(place, "unknown.", f"Choose one of: {', '.join(DEVICES)}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise FxquantError(place, "torch finds no CUDA device.", "Install torch for CUDA, or leave out --device.")
    if name == "npu":
        if find_spec("torch_npu") is None:
            raise FxquantError(place, "torch_npu is not installed.", "Install it beside CANN, or leave out --device.")
        import torch_npu  # noqa: F401  # registers the device with torch

        if not torch.npu.is_available():  # type: ignore[attr-defined]
            raise FxquantError(place, "torch_npu finds no NPU.", "Check npu-smi info, or leave out --device.")
    return torch.device(name)
