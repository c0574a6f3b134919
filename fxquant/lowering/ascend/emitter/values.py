"""Values of an emitted module that differ from those of the graph: in dtype, and in one case in shape."""

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
"""Results that are one scale per row."""
SUMS = ((ops.add_rms_norm, 1), (ops.add_rms_norm_quantize_static, 1), (ops.add_rms_norm_quantize_per_token, 2))
"""Results that are the sum in front of a fused norm."""


def drops_last_dimension(node: fx.Node) -> bool:
    """Whether it is the scale of a per-token quantization: [..., 1] in the graph, [...] from an engine operator."""
    return producer(node) in TOKEN_SCALES


def is_residual(node: fx.Node) -> bool:
    """Whether it is the sum that a fused norm also returns."""
    return producer(node) in SUMS


def is_int32(node: fx.Node) -> bool:
    """Whether it is expert ids or row numbers: int64 in the graph, int32 from an engine operator."""
    return producer(node) in ((ops.moe_gate, 0), (ops.moe_init_routing, 1))


def to_engine(node: fx.Node, value: Any) -> Any:
    """A value of the graph in the form of the emitted module's variable, in float32."""
    if drops_last_dimension(node):
        return value.squeeze(-1)
    return value.int() if is_int32(node) else value


def float32_values(program: Program) -> set[fx.Node]:
    """Values that stay float32 when the model runs in another dtype: routing scores, and results of a user's cast.

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
    """Whether the value, or one of a tuple, is a floating-point tensor."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, Tensor) and item.is_floating_point() for item in values)
