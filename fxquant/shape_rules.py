"""Shape rules run once for each signature: what a call gives depends on shapes, dtypes and numbers alone."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from fxquant.meta import call_on_meta


class ShapeRules:
    """Calls on fake or meta tensors; calls of one signature give one and the same result."""

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """`target(*args, **kwargs)`; raises what the operator's shape rule raises."""
        kwargs = kwargs or {}
        if not isinstance(target, torch._ops.OpOverload):
            return target(*args, **kwargs)
        key = (target, _signature(args), _signature(kwargs))
        if key not in self._results:
            self._results[key] = call_on_meta(target, args, kwargs)
        return self._results[key]

    def fake(self, tensor: Tensor, mode: FakeTensorMode) -> Tensor:
        """`tensor`, on meta, with fixed sizes in the mode of a trace."""
        key = (mode, _signature(tensor))
        if key not in self._results:
            self._results[key] = mode.from_tensor(tensor, static_shapes=True)
        return self._results[key]


def _signature(value: Any) -> Any:
    """All that a shape rule sees of an argument."""
    if isinstance(value, Tensor):
        mode = id(value.fake_mode) if isinstance(value, FakeTensor) else None
        return Tensor, mode, value.dtype, _signature(value.shape), _signature(value.stride())
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return type(value), value.node.expr
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((key, _signature(item)) for key, item in value.items())
    return type(value), value
