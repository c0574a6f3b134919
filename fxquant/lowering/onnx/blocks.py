"""Block products: calls of the block operators, with weights as their stacks and blocks lie in the weight files."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from torch import fx

from fxquant import ops
from fxquant.lowering.onnx.functions import contrib
from fxquant.lowering.onnx.initializers import Blocks, Initializers, View
from fxquant.lowering.onnx.node_lowering import NodeLowering
from fxquant.lowering.output_folder.stacks import gate_up_name
from fxquant.program.experts import ExpertRecipes
from fxquant.program.node_names import operator_name
from fxquant.program.operands import arguments
from fxquant.program.program import Program

PROJECTIONS = ("gate", "up", "down")
"""Weights of `block_experts`, by the names of its arguments."""


class BlockProducts:
    """Emits `block_linear` and `block_experts` into the main graph."""

    def __init__(self, program: Program, initializers: Initializers) -> None:
        self._program, self._initializers = program, initializers
        self._lower: dict[Any, Callable[[NodeLowering, fx.Node], None]] = {
            ops.block_linear: self._linear,
            ops.block_experts: self._experts,
        }

    def lower(self, lowering: NodeLowering, node: fx.Node) -> bool:
        """Emit `node`, if it is one of the two; whether it is."""
        emit = self._lower.get(node.target)
        if emit is not None:
            lowering.builder.enter(f"{node.name}/")
            emit(lowering, node)
        return emit is not None

    def _linear(self, lowering: NodeLowering, node: fx.Node) -> None:
        given = arguments(node)
        view = Blocks(given.pop("block_size"))
        values = {name: lowering.value(arg, view if name == "weight" else View.STORED) for name, arg in given.items()}
        self._call(lowering, node, contrib.block_linear, values)

    def _experts(self, lowering: NodeLowering, node: fx.Node) -> None:
        given = arguments(node)
        gate, up, down = (self._program.recipes[self._program.parameter(given[name]).module] for name in PROJECTIONS)
        values: dict[str, Any] = {"gate_up": self._initializers.get(gate_up_name(ExpertRecipes(gate, up, down)))}
        for name, arg in given.items():
            if name not in ("gate", "up"):
                stored = isinstance(arg, fx.Node) and arg.op == "get_attr"
                values[name] = self._initializers.get(str(arg.target)) if stored else lowering.value(arg)
        self._call(lowering, node, contrib.block_experts, values)

    def _call(
        self, lowering: NodeLowering, node: fx.Node, body: Callable[..., ir.Value], values: dict[str, Any]
    ) -> None:
        lowering.set(node, lowering.call(operator_name(node), body, values, node.name))
