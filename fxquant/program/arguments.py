"""Call arguments in a graph file: numbers, names of earlier nodes, dtypes and the words that operators take."""

import math
import re
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from fxquant.errors import FxquantError
from fxquant.inputs.limits import NAME_LENGTH

LARGEST = 1 << 63
"""Integers must fit int64; 2**63 - 1 means "to the end"."""
WORD = re.compile(r"[\w.\-,> ]*", re.ASCII)
"""A mode, or the equation of an einsum; it becomes source text of the Ascend module."""
FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
        "float8_e4m3fn", "complex64", "complex128",
    )
}  # fmt: skip
PLACEMENT = ("device", "layout", "pin_memory", "out", "memory_format")
"""Keywords that no call may have: the caller decides where tensors are."""


def encode(value: Any, refer: Callable[[fx.Node], str] = attrgetter("name")) -> Any:
    """Arguments of a call as JSON; `refer` gives the names of nodes."""
    if isinstance(value, fx.Node):
        return {"node": refer(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, dict):
        return {"map": {key: encode(item, refer) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return [encode(item, refer) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FxquantError(
        repr(value), f"an argument of type {type(value).__name__} cannot be stored.", "Use numbers, text or tensors."
    )


def decode(value: Any, nodes: Mapping[str, fx.Node], named: bool = False) -> Any:
    """The inverse of `encode`; `named`: `value` holds a call's keywords. Raises ValueError for any other form."""
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    if isinstance(value, dict):
        return _keywords(value, nodes) if named else _tagged(value, nodes)
    if isinstance(value, str) and (len(value) > NAME_LENGTH or not WORD.fullmatch(value)):
        raise ValueError(f"argument {value[:NAME_LENGTH]!r}")
    if type(value) is int and not -LARGEST <= value < LARGEST:
        raise ValueError(f"argument {value} does not fit int64")
    return value


def _keywords(value: dict[str, Any], nodes: Mapping[str, fx.Node]) -> dict[str, Any]:
    if set(value) != {"map"} or not isinstance(value["map"], dict):
        raise ValueError("its keywords are not a map")
    wrong = next((key for key in value["map"] if key in PLACEMENT or not key.isidentifier() or not key.isascii()), None)
    if wrong is not None:
        raise ValueError(f"keyword {wrong[:NAME_LENGTH]!r} is not allowed")
    return {key: decode(item, nodes) for key, item in value["map"].items()}


def _tagged(value: dict[str, Any], nodes: Mapping[str, fx.Node]) -> Any:
    if len(value) != 1:
        raise ValueError(f"an argument has {len(value)} keys, not 1")
    ((key, content),) = value.items()
    if not isinstance(content, str):
        raise ValueError(f"argument {key[:NAME_LENGTH]!r} does not name anything")
    if key == "node":
        if content not in nodes:
            raise ValueError(f"no earlier node is named {content[:NAME_LENGTH]!r}")
        return nodes[content]
    if key == "dtype":
        return read_dtype(content)
    if key == "float" and content in FLOATS:
        return FLOATS[content]
    raise ValueError(f"argument {key[:NAME_LENGTH]!r}: {content[:NAME_LENGTH]!r}")


def read_dtype(name: str | None) -> torch.dtype:
    """The dtype of a name. Raises ValueError for names outside of `TORCH_DTYPES`."""
    if name not in TORCH_DTYPES:
        raise ValueError(f"dtype {str(name)[:NAME_LENGTH]!r}")
    return TORCH_DTYPES[name]
