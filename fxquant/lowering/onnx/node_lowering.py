"""Node lowering, fx calls → ONNX: an fxq operator becomes a call of its function, an aten operator plain nodes."""

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from fxquant.errors import FxquantError
from fxquant.lowering.onnx.aten import MATH_OPERATORS, SHAPE_OPERATORS
from fxquant.lowering.onnx.aten_shape import Lower, Result
from fxquant.lowering.onnx.builder import ZERO_POINT, Builder
from fxquant.lowering.onnx.function_table import FunctionTable
from fxquant.lowering.onnx.functions import BODIES, VIEWS
from fxquant.lowering.onnx.initializers import Blocks, View
from fxquant.lowering.onnx.shapes import DTYPES, Meta, Shapes
from fxquant.program.node_names import operator_name
from fxquant.program.operands import arguments, item_of

INT8, UINT8, INT32 = ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32
NUMBER = "python"
"""Metadata key of sizes: values that are Python integers in the fx graph."""
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
REMEDY = "Write it with the operators of fxquant/lowering/onnx/aten.py, or compile for another target."
RESULT_SAYS_IT = frozenset(
    ("dtype", "layout", "device", "pin_memory", "non_blocking", "copy", "memory_format", "cudnn_enable", "sparse_grad")
    + ("split_size", "split_sizes", "chunks")
)
"""aten arguments that a lowering does not need: they have no effect, or the result's dtype and shapes show them."""
STORED = frozenset(
    ("weight", "bias", "correction_bias", "input_scale", "input_offset", "weight_scale", "weight_scale_second")
    + ("deq_scale", "quant_bias", "kv_b_weight")
)
"""Arguments of fxq operators that their functions take in the stored dtype."""
SYMBOLIC_INTEGERS = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "Div"}

Parameters = Callable[[fx.Node, View | Blocks], ir.Value]


class NodeLowering:
    """Lowers calls in graph order into `builder`.

    parameters  get_attr node and view of its bytes → value
    values      values of the nodes so far; a tuple for a call with several results
    shapes      dtype and dimensions of each node's value
    named       give each result the name of its fx node; False inside functions
    prefix      of the names of functions
    """

    def __init__(
        self, builder: Builder, functions: FunctionTable, parameters: Parameters, shapes: Shapes, named: bool,
        prefix: str = "",
    ) -> None:  # fmt: skip
        self.builder, self._functions, self._parameters = builder, functions, parameters
        self.shapes, self._named, self._prefix = shapes, named, prefix
        self.values: dict[fx.Node, Any] = {}

    def lower(self, node: fx.Node) -> None:
        """Add the nodes of one call_function node."""
        if self._named:
            self.builder.enter(f"{node.name}/")
        call, index = item_of(node)
        if index is not None:
            result = self.values[call][index]
        elif node.target in SYMBOLIC_INTEGERS:
            sizes = [self.builder.sizes(self.value(arg)) for arg in node.args]
            result = self.builder.op(SYMBOLIC_INTEGERS[node.target], *sizes)
        elif node.target in BODIES:
            result = self._call(node)
        else:
            result = self._plain(node)
        self.set(node, result)

    def set(self, node: fx.Node, result: Any) -> None:
        """Record the result of `node`: its dtype, shape and, in the main graph, its name."""
        if isinstance(result, tuple):
            self.values[node] = result
            for value, meta in zip(result, self.shapes[node], strict=True):
                self._declare(value, meta)
            return
        if self._named:
            owned = result.name.startswith(self.builder.scope) or node.target is operator.getitem
            # an Identity where the result is another node's value: `extract` finds each node's value by its name
            if not owned or "/" not in result.name:
                result = self.builder.op("Identity", result)
            result.name = node.name
        self._declare(result, self.shapes[node])
        self.values[node] = result

    def _declare(self, value: ir.Value, meta: Meta) -> None:
        value.dtype, value.shape = meta.onnx_dtype, meta.shape if self._named else ir.Shape(meta.fixed)
        if meta.number:
            value.metadata_props[NUMBER] = "int"

    def value(self, arg: Any, view: View | Blocks = View.STORED) -> Any:
        """An fx argument with ir.Values in place of nodes; None and numbers are unchanged."""
        if isinstance(arg, fx.Node):
            return self._parameters(arg, view) if arg.op == "get_attr" else self.values[arg]
        if isinstance(arg, list | tuple):
            return [self.value(item) for item in arg]
        return arg

    def _call(self, node: fx.Node) -> Any:
        bound = {}
        for name, arg in arguments(node).items():
            value = self.value(arg, VIEWS.get((node.target, name), View.STORED))
            bound[name] = value if name in STORED else self._widened(arg, value)
        return self.call(operator_name(node), BODIES[node.target], bound, node.name if self._named else "")

    def call(self, name: str, body: Callable[..., Any], arguments: Mapping[str, Any], label: str = "") -> Any:
        """A call of the local function of `body`, or its nodes; `label` names the call."""
        outputs = self._functions.call(self.builder, self._prefix + name, body, arguments)
        if label and not self._functions.inline:
            self.builder.nodes[-1].name = label
        return outputs if len(outputs) > 1 else outputs[0]

    def _plain(self, node: fx.Node) -> Any:
        math, shape = MATH_OPERATORS.get(node.target), SHAPE_OPERATORS.get(node.target)
        lower = math or shape
        if lower is None:
            raise unsupported(node, "has no ONNX form")
        carry = self._signed if math else self._carried  # moving elements works on uint8 = int8 + 128 as it is
        bound = {name: self._operand(arg, carry) for name, arg in bind(node).items()}
        metas = self.shapes.outputs(node)
        out = Result(DTYPES[metas[0].dtype], tuple(meta.fixed for meta in metas))
        try:
            result = lower(self.builder, out, **taken(lower, node, bound))
        except ValueError as error:
            raise unsupported(node, f"{error}, which has no ONNX form here") from error
        if math and out.dtype is INT8 and isinstance(result, ir.Value):
            result.dtype = INT8
            return self._carried(result)
        return result

    def _operand(self, arg: Any, carry: Callable[[ir.Value], ir.Value]) -> Any:
        if isinstance(arg, list | tuple):
            return [self._operand(item, carry) for item in arg]
        value = self._widened(arg, self.value(arg))
        return carry(value) if isinstance(value, ir.Value) else value

    def _widened(self, arg: Any, value: Any) -> Any:
        """A half-precision parameter as float32, as `fxquant.runtime.weight_providers.load` returns it."""
        if not isinstance(arg, fx.Node) or arg.op != "get_attr" or value.dtype not in HALVES:
            return value
        shape, wide = value.shape, self.builder.float(value)
        wide.shape = shape
        return wide

    def _signed(self, value: ir.Value) -> ir.Value:
        return self._shifted(value, UINT8, INT8, "Sub")

    def _carried(self, value: ir.Value) -> ir.Value:
        return self._shifted(value, INT8, UINT8, "Add")

    def _shifted(self, value: ir.Value, before: ir.DataType, after: ir.DataType, op_type: str) -> ir.Value:
        if value.dtype != before:
            return value
        b = self.builder
        # by way of int32: the shift overflows int8
        moved = b.op(op_type, b.op("Cast", value, to=int(INT32)), b.constant(torch.tensor(ZERO_POINT).int().numpy()))
        result = b.op("Cast", moved, to=int(after))
        result.dtype, result.shape = after, value.shape
        return result


def bind(node: fx.Node) -> dict[str, Any]:
    """`arguments` with `self` and `input` renamed to `x`, as the functions of aten operators name it."""
    return {"x" if name in ("self", "input") else name: value for name, value in arguments(node).items()}


def taken(lower: Lower, node: fx.Node, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments for which `lower` has parameters; any other must have its default or no effect."""
    parameters = inspect.signature(lower).parameters
    defaults = {argument.name: argument.default_value for argument in node.target._schema.arguments}  # type: ignore
    for name, value in arguments.items():
        if name not in parameters and name not in RESULT_SAYS_IT and value != defaults.get(name):
            raise ValueError(f"sets {name}")
    return {name: value for name, value in arguments.items() if name in parameters}


def unsupported(node: fx.Node, fact: str) -> FxquantError:
    place = f"{node.name} ({node.meta.get('module') or 'the model'})"
    return FxquantError(place, f"{node.target} {fact}.", REMEDY)
