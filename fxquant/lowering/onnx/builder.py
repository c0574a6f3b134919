"""ONNX node builder: the same calls fill the main graph, a function body or an If branch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

OPSET = 21
"""The first opset with int4 tensors; IR version 10 belongs to it."""
IR_VERSION = 10
DOMAIN, CONTRIB = "fxquant", "com.microsoft"
FLOAT = ir.DataType.FLOAT
ZERO_POINT = 128
"""int8 activations are carried as uint8 = int8 + 128: u8 x s8 products have fast kernels, s8 x s8 ones do not."""

Body = Callable[..., Any]
"""A builder and the arguments of an operator → its results: the body of a local function."""
Attribute = int | float | str | Sequence[int] | ir.Graph | ir.TensorProtocol
Size = int | ir.Value
"""A dimension: a number, or an int64 value of shape [1]."""


class Builder:
    """Nodes in order. Values are named `<scope><operator>`, then `<scope><operator>.1`, …"""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.scope = ""
        self._taken: set[str] = set()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def enter(self, scope: str) -> None:
        """Name the next nodes `<scope>…`, a scope that was not used before; constants are not shared across scopes."""
        self.scope = scope
        self._taken.clear()
        self._constants.clear()

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """One standard node with one output."""
        return self._add(op_type, "", inputs, 1, attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, **attributes: Attribute
    ) -> tuple[ir.Value, ...]:
        """One standard node with `outputs` outputs."""
        return self._add(op_type, "", inputs, outputs, attributes)

    def contrib(self, op_type: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """One node of onnxruntime's own operators, with one output."""
        return self._add(op_type, CONTRIB, inputs, 1, attributes)[0]

    def call(self, function: ir.Function, inputs: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
        """A call of a local function."""
        return self._add(function.name, DOMAIN, inputs, len(function.outputs), {})

    def either(
        self, condition: ir.Value, name: str, then: Callable[["Builder"], ir.Value], other_name: str,
        otherwise: Callable[["Builder"], ir.Value],
    ) -> ir.Value:  # fmt: skip
        """An If whose branches take values of this graph; each is named, and so are its nodes."""
        branches = []
        for label, fill in ((name, then), (other_name, otherwise)):
            inner = Builder()
            inner.enter(f"{self.scope}{label}/")
            result = fill(inner)
            branches.append(ir.Graph([], [result], nodes=inner.nodes, name=label))
        return self.op("If", condition, then_branch=branches[0], else_branch=branches[1])

    def _add(
        self,
        op_type: str,
        domain: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        attributes: Mapping[str, Attribute],
    ) -> tuple[ir.Value, ...]:
        given = list(inputs)
        while given and given[-1] is None:  # onnxruntime 1.32 crashes on a LayerNormalization whose bias is "".
            given.pop()
        node = ir.node(op_type, given, attributes, domain=domain, num_outputs=outputs)
        node.name = self._name(op_type.lower())
        for index, value in enumerate(node.outputs):
            value.name = node.name if outputs == 1 else f"{node.name}[{index}]"
        self.nodes.append(node)
        return tuple(node.outputs)

    def _name(self, stem: str) -> str:
        name, count = self.scope + stem, 0
        while name in self._taken:
            count += 1
            name = f"{self.scope}{stem}.{count}"
        self._taken.add(name)
        return name

    def constant(self, array: np.ndarray | np.generic) -> ir.Value:
        """A Constant node, shared by equal arrays of a scope. Zero-dimensional arrays stay zero-dimensional."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.own_constant(array)
        return self._constants[key]

    def own_constant(self, array: np.ndarray | np.generic) -> ir.Value:
        """A Constant node that is not shared."""
        array = np.asarray(array)
        value = self.op("Constant", value=ir.tensor(array))
        value.dtype = ir.DataType.from_numpy(array.dtype)
        return value

    def ints(self, *values: int) -> ir.Value:
        """int64 [len(values)]."""
        return self.constant(np.array(values, dtype=np.int64))

    def number(self, value: float) -> ir.Value:
        """float32, zero-dimensional."""
        return self.constant(np.float32(value))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` as `dtype`; unchanged if it is known to have that dtype."""
        if value.dtype == dtype:
            return value
        result = self.op("Cast", value, to=int(dtype))
        result.dtype = dtype
        return result

    def float(self, value: ir.Value) -> ir.Value:
        """A stored parameter of any floating dtype as float32."""
        return self.cast(value, FLOAT)

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """int64 [1]: one dimension of `value`."""
        end = {} if axis == -1 else {"end": axis + 1}
        return self.op("Shape", value, start=axis, **end)

    def sizes(self, *sizes: Size) -> ir.Value:
        """int64 [len(sizes)] for a Reshape or an Expand."""
        if all(isinstance(size, int) for size in sizes):
            return self.ints(*(size for size in sizes if isinstance(size, int)))
        parts = [self.ints(size) if isinstance(size, int) else size for size in sizes]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def reshape_last(self, value: ir.Value, drop: int, *sizes: int) -> ir.Value:
        """Replace the last `drop` dimensions by `sizes`; the others may be dynamic."""
        leading = self.op("Shape", value, start=0, end=-drop)
        return self.op("Reshape", value, self.op("Concat", leading, self.ints(*sizes), axis=0), allowzero=1)

    def split_last(self, value: ir.Value, *sizes: int) -> tuple[ir.Value, ...]:
        """Consecutive parts of the last dimension."""
        return self.ops("Split", value, self.ints(*sizes), outputs=len(sizes), axis=-1)

    def sigmoid(self, value: ir.Value) -> ir.Value:
        """`1 / (1 + exp(-x))`: the Sigmoid operator of onnxruntime is a coarser approximation."""
        return self.op("Div", self.number(1), self._one_plus_exp_minus(value))

    def silu(self, value: ir.Value) -> ir.Value:
        """`x / (1 + exp(-x))`, as torch computes it."""
        return self.op("Div", value, self._one_plus_exp_minus(value))

    def _one_plus_exp_minus(self, value: ir.Value) -> ir.Value:
        return self.op("Add", self.op("Exp", self.op("Neg", value)), self.number(1))
