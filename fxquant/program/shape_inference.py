"""Shape inference, cached per signature: what a call gives depends on shapes, dtypes and numbers alone."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from fxquant.program.meta import call_on_meta


class ShapeRules:
    """Calls on fake or meta tensors; calls of the same signature give the same object."""

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}
        self._seen: dict[int, tuple[Tensor, Any]] = {}
        """id of a tensor → the tensor, kept so that no other gets its id, and its signature."""

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """`target(*args, **kwargs)`; raises what the operator's shape rule raises."""
        kwargs = kwargs or {}
        if not isinstance(target, torch._ops.OpOverload):
            return target(*args, **kwargs)
        key = (target, self._signature(args), self._signature(kwargs))
        if key not in self._results:
            self._results[key] = self.compute(target, args, kwargs)
        return self._results[key]

    def compute(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a signature that is not cached."""
        return call_on_meta(target, args, kwargs)

    def fake(self, tensor: Tensor, mode: FakeTensorMode) -> Tensor:
        """`tensor`, on meta, with fixed sizes in the mode of a trace."""
        key = (mode, self._signature(tensor))
        if key not in self._results:
            self._results[key] = mode.from_tensor(tensor, static_shapes=True)
        return self._results[key]

    def _signature(self, value: Any) -> Any:
        """All that a shape rule sees of an argument."""
        if isinstance(value, Tensor):
            seen = self._seen.get(id(value))
            if seen is None:
                seen = self._seen[id(value)] = (value, _tensor_signature(value))
            return seen[1]
        if isinstance(value, list | tuple):
            return tuple(map(self._signature, value))
        if isinstance(value, dict):
            return tuple((key, self._signature(item)) for key, item in value.items())
        return _number(value)


def _tensor_signature(tensor: Tensor) -> Any:
    """All that a shape rule sees of a tensor."""
    mode = id(tensor.fake_mode) if isinstance(tensor, FakeTensor) else None
    return Tensor, mode, tensor.dtype, _sizes(tensor.shape), _sizes(tensor.stride())


def _sizes(values: tuple[int, ...]) -> Any:
    return tuple(_number(value) for value in values)


def _number(value: Any) -> Any:
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return type(value), value.node.expr
    return type(value), value
