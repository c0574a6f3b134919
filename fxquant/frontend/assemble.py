"""Module assembly: instances of our classes from existing parts."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxquant.errors import FxquantError

Module = TypeVar("Module", bound=nn.Module)


def assemble(cls: type[Module], **parts: Any) -> Module:
    """An instance of `cls` with these attributes; its constructor does not run."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def fetch(module: nn.Module, path: str) -> Any:
    """The attribute at dotted `path`; raises FxquantError where the module has none."""
    value: Any = module
    for name in path.split("."):
        if not hasattr(value, name):
            fact = f"an adapter looks for {path!r}, but there is no {name!r}."
            names = sorted({*module._modules, *module._parameters, *module._buffers})
            raise FxquantError(type(module).__name__, fact, f"It has: {', '.join(names)}. Name one of these.")
        value = getattr(value, name)
    return value


def parameter(tensor: Tensor) -> nn.Parameter:
    """`tensor` as a float32 parameter, sharing memory where it is float32 already."""
    return nn.Parameter(tensor.detach().to(torch.float32), requires_grad=False)


def optional_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    """As `parameter`, for a bias that may be absent."""
    return None if tensor is None else parameter(tensor)


def with_attributes(made: nn.Module, own: nn.Module) -> nn.Module:
    """`made` with the plain attributes of `own` that it lacks, for a forward around it that reads them."""
    for name, value in vars(own).items():
        if not name.startswith("_") and not hasattr(made, name) and not callable(value):
            vars(made)[name] = value
    for name, held in own._parameters.items():
        if held is None and not hasattr(made, name):
            vars(made)[name] = None
    return made
