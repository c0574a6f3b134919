"""Bounded shape inference for untrusted graph files: a call that would take too much memory is refused."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.inputs.limits import PIECES
from fxquant.program.meta import call_on_meta
from fxquant.program.operators import OPERATORS, call_python
from fxquant.program.shape_inference import ShapeRules


class BoundedRules(ShapeRules):
    """Calls operators by name on meta tensors; one call may take `limit` bytes, intermediate tensors included."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def named(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Raises ValueError above the limit, and whatever the operator raises."""
        target = OPERATORS[name]
        if not isinstance(target, torch._ops.OpOverload):
            return call_python(name, target, args, kwargs)
        return self.call(target, args, kwargs)

    def compute(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _check_pieces(target, args, kwargs)
        with _Counting(self.limit):
            return call_on_meta(target, args, kwargs)


class _Counting(TorchDispatchMode):
    """Sums the storage of all tensors created inside; a view takes none."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.taken = limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _check_pieces(func, args, kwargs or {})  # a tensor in the place of sizes is taken apart on the way to a call
        given = {storage(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        results = {storage(tensor): tensor for tensor in _tensors(result)}
        self.taken += sum(tensor.untyped_storage().nbytes() for key, tensor in results.items() if key not in given)
        if self.taken > self.limit:
            raise ValueError(f"takes {self.taken:,} bytes, the limit is {self.limit:,}")
        return result


def most_alive(graph: fx.Graph, values: Mapping[fx.Node, Any]) -> int:
    """Peak bytes of live values, if each lives to the end of the block of its last use.

    `values`: node → its value, on meta. Parameters, inputs and views are not counted.
    """
    nodes = [node for node in graph.nodes if node.op in ("call_function", "output")]
    last = {argument: node.meta["block"] for node in nodes for argument in node.all_input_nodes}
    alive: dict[fx.Node, int] = {}
    most = total = 0
    for block, members in groupby(nodes, lambda node: node.meta["block"]):
        for node in members:
            alive[node] = 0 if node.op == "output" or _is_view(node) else _bytes(values[node])
            total += alive[node]
        most = max(most, total)
        for dead in [node for node in alive if last.get(node, block) == block]:
            total -= alive.pop(dead)
    return most


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def _bytes(value: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(value))


def storage(tensor: Tensor) -> int:
    """Id of a tensor's memory, which its views share."""
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _check_pieces(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises ValueError, before a list of tensors is created, if it would be too long."""
    if not target._schema.returns or str(target._schema.returns[0].type) != "List[Tensor]":
        return
    given = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False)) | kwargs
    whole = args[0] if args else None
    count = len(whole) if isinstance(whole, list | tuple) else 0
    if isinstance(whole, Tensor):
        length = whole.shape[given.get("dim", 0)]
        most = given.get("chunks", given.get("sections", length))
        step = given.get("split_size", 1)
        sizes = step if isinstance(step, list | tuple) else given.get("split_sizes")
        count = len(sizes) if sizes is not None else min(length // max(step, 1), most)
    if count > PIECES:
        raise ValueError(f"gives {count:,} tensors, the limit is {PIECES:,}")
