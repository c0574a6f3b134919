"""Meta calls: operators called on meta tensors, for shapes and dtypes without values."""

from typing import Any

import torch


def call_on_meta(target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`target(*args, **kwargs)`; an operator that creates tensors creates them on meta too."""
    arguments = target._schema.arguments if isinstance(target, torch._ops.OpOverload) else ()
    if any(argument.name == "device" for argument in arguments):
        kwargs = {**kwargs, "device": "meta"}
    return target(*args, **kwargs)
