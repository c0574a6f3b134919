"""How the values of an emitted module differ from those of the graph: in dtype, and one shape."""

from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.program.operands import operand, producer
from fxquant.program.program import Program

TOKEN_SCALES = (
    (ops.quantize_per_token, 1),
    (ops.add_rms_norm_quantize_per_token, 1),
    (ops.swiglu_quantize_per_token, 1),
)
"""Results that are a scale for each row."""
SUMS = ((ops.add_rms_norm, 1), (ops.add_rms_norm_quantize_static, 1), (ops.add_rms_norm_quantize_per_token, 2))
"""Results that are what a fused norm added."""


def drops_last_dimension(node: fx.Node) -> bool:
    """Scales of a per-token quantization: [..., 1] in the graph, [...] of an engine operator."""
    return producer(node) in TOKEN_SCALES


def is_residual(node: fx.Node) -> bool:
    """The sum that a norm made on its way."""
    return producer(node) in SUMS


def is_int32(node: fx.Node) -> bool:
    """Expert ids and row numbers: int64 in the graph, int32 of an engine operator."""
    return producer(node) in ((ops.moe_gate, 0), (ops.moe_init_routing, 1))


def to_engine(node: fx.Node, value: Any) -> Any:
    """A value of the graph as the emitted module's variable holds it, in float32."""
    if drops_last_dimension(node):
        return value.squeeze(-1)
    return value.int() if is_int32(node) else value


def float32_values(program: Program) -> set[fx.Node]:
    """Values that stay float32 when the model runs in another dtype: routing scores, and what a user's cast made.

    In a float32 graph `.float()` and `.to(x.dtype)` look alike, so a cast value is rounded to the model's dtype only
    where an operator needs that.
    """
    float32: set[fx.Node] = set()
    for node in program.graph.graph.nodes:
        if node.op == "call_function" and _stays_float32(node, float32):
            float32.add(node)
    return float32


def _stays_float32(node: fx.Node, float32: set[fx.Node]) -> bool:
    if node.target in (ops.router_logits, ops.moe_gate):
        return True
    if node.target in ops.REFERENCES or not _is_floating(node):
        return False
    if node.target in (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default):
        return operand(node, "dtype") is torch.float32
    arguments = [argument for argument in node.all_input_nodes if _is_floating(argument)]
    return not arguments or any(argument in float32 for argument in arguments)


def _is_floating(node: fx.Node) -> bool:
    """Of a tuple, whether one of its values is."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, Tensor) and item.is_floating_point() for item in values)
