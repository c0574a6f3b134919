"""Argument checks that all kernels share."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Any]

_SCALAR_TYPES: dict[int, torch.dtype] = {
    1: torch.int8,
    3: torch.int32,
    5: torch.float16,
    6: torch.float32,
    12: torch.qint8,
    13: torch.quint8,
    15: torch.bfloat16,
}
"""c10::ScalarType: a torch.dtype given for an `int` parameter reaches the kernel as this number."""
OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Output dtypes of a matmul. float32 is ours, for exact comparison. Devices return the others, and by default int8."""


def require(condition: Any, message: str) -> None:
    """Raise ValueError unless `condition`; the message begins with the operator and the argument."""
    if not condition:
        raise ValueError(message)


def dtype_of(code: int | None, argument: str, allowed: tuple[torch.dtype, ...]) -> torch.dtype:
    """The torch.dtype behind `code`; `argument` is "operator: argument" for the message."""
    dtype = None if code is None else _SCALAR_TYPES.get(code)
    if dtype is None or dtype not in allowed:
        names = ", ".join(str(choice) for choice in allowed)
        given = "None (int8 on a device)" if code is None else dtype or code
        raise ValueError(f"{argument} is {given}; the CPU reference takes {names}")
    return dtype


def only_supported(kernel: Kernel, schema: str) -> Kernel:
    """`kernel` with all arguments of `schema`: one that it does not implement must have its default, else ValueError.

    The schemas' `self` and `input` are `x` in our kernels.
    """
    parsed = torch._C.parse_schema(schema)
    names = ["x" if argument.name in {"self", "input"} else argument.name for argument in parsed.arguments]
    defaults = {argument.name: argument.default_value for argument in parsed.arguments if argument.has_default_value()}
    taken = frozenset(inspect.signature(kernel).parameters)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        for name in given.keys() - taken:
            require(
                not isinstance(given[name], Tensor) and given[name] == defaults[name],
                f"{parsed.name}: {name} is not supported by the CPU reference; leave it at {defaults[name]!r}",
            )
        return kernel(**{name: value for name, value in given.items() if name in taken})

    return call
