"""Definition of `fxq::` operators: schema, exact CPU reference and shape rule side by side."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("fxq", "DEF")

Function = Callable[..., Any]
REFERENCES: dict[torch._ops.OpOverload, Function] = {}
"""Operator → its Python reference, for callers that read weights lazily (`fxquant.runtime.execute`)."""


def define(schema: str, shape_rule: Function) -> Callable[[Function], torch._ops.OpOverload]:
    """Decorate the CPU reference of operator `fxq::<schema>`; the decorated name becomes the operator.

    `shape_rule` takes the same arguments (fake or meta tensors), checks dtypes and shapes with `torch._check` and
    returns empty tensors with the result's shape and dtype.
    """
    name = schema.split("(")[0]

    def register(reference: Function) -> torch._ops.OpOverload:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxq::{name}", shape_rule, lib=_LIBRARY)
        operator = getattr(torch.ops.fxq, name).default
        REFERENCES[operator] = reference
        return operator

    return register


def expect(condition: Any, message: str) -> None:
    """Assertion of a shape rule; the message names the operator and the fact."""
    torch._check(condition, lambda: message)
