"""One dialect operator through ONNX Runtime and through its fxq:: reference."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from safetensors.torch import save_file
from torch import Tensor

from fxquant import ops
from fxquant.lowering.onnx.builder import DOMAIN, OPSET, Builder
from fxquant.lowering.onnx.extract import EXTERNAL_FOLDER
from fxquant.lowering.onnx.function_table import FunctionTable
from fxquant.lowering.onnx.functions import BODIES
from fxquant.lowering.onnx.initializers import View, external
from fxquant.lowering.onnx.node_lowering import VIEWS
from fxquant.lowering.onnx.runner import session_options
from fxquant.lowering.onnx.shapes import DTYPES
from fxquant.storage.safetensors import read_header

UNIT = 2.0**-24
"""Half a step of float32 at 1: one rounding moves a value by at most this fraction."""


def floats(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def int8(*shape: int, seed: int = 0) -> Tensor:
    return integers(-128, 128, *shape, seed=seed)


class Lowered:
    """The local function of one dialect operator as a model; parameters named in `stored` lie in a weight file."""

    def __init__(self, folder: Path, target: Any, arguments: tuple, stored: tuple[str, ...]) -> None:
        names = [argument.name for argument in target._schema.arguments]
        bound = dict(itertools.zip_longest(names, arguments))
        save_file(
            {name: bound[name].contiguous() for name in stored if is_tensor(bound.get(name))}, folder / "w.safetensors"
        )
        tensors = read_header(folder / "w.safetensors")
        values = dict(bound)
        for name, value in bound.items():
            if name in tensors:
                values[name] = external(tensors, name, VIEWS.get((target, name), View.STORED))
            elif isinstance(value, Tensor):
                dims = [None] * (value.dim() - 1) + [value.shape[-1]]
                dtype = ir.DataType.UINT8 if value.dtype is torch.int8 else DTYPES[value.dtype]
                values[name] = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))
        self.feeds = {name: array(value) for name, value in bound.items() if name not in tensors and is_tensor(value)}
        self.model = function_model(target, values)
        options = session_options()
        options.add_session_config_entry(EXTERNAL_FOLDER, str(folder))
        self._session = onnxruntime.InferenceSession(self.model.SerializeToString(), options)

    def run(self) -> list[Tensor]:
        return [restored(value) for value in self._session.run(None, self.feeds)]


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def array(value: Tensor) -> np.ndarray:
    return (value.short() + 128).to(torch.uint8).numpy() if value.dtype is torch.int8 else value.numpy()


def restored(value: np.ndarray) -> Tensor:
    return (
        torch.from_numpy(value.astype(np.int16) - 128).to(torch.int8)
        if value.dtype == np.uint8
        else torch.from_numpy(value)
    )


def function_model(target: Any, values: dict[str, Any]) -> onnx.ModelProto:
    functions, builder = FunctionTable(), Builder()
    function = functions.get(target._opname, BODIES[target], values)
    passed = [value for value in values.values() if isinstance(value, ir.Value)]
    outputs = builder.call(function, passed)
    results = [torch.float32] * len(outputs)
    if target in (ops.quantize_static, ops.quantize_per_token):
        results[0] = torch.int8
    if target in (ops.int_matmul, ops.int4_matmul):
        results[0] = torch.int32
    if target in (ops.moe_gate, ops.moe_init_routing):
        results = [torch.int64, torch.float32] if target is ops.moe_gate else [torch.float32, torch.int64, torch.int64]
    for value, dtype in zip(outputs, results, strict=True):
        value.dtype = ir.DataType.UINT8 if dtype is torch.int8 else DTYPES[dtype]
    graph = ir.Graph(
        [value for value in passed if value.const_value is None],
        outputs,
        nodes=builder.nodes,
        initializers=[value for value in passed if value.const_value is not None],
        opset_imports={"": OPSET, DOMAIN: 1},
        name="one",
    )
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=functions.functions))


def both(folder: Path, target: Any, *arguments: Any, stored: tuple[str, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    """(emitted, reference) of each output; stored floats reach the reference as float32, as `load` gives them."""
    names = [argument.name for argument in target._schema.arguments]
    wide = [
        value.float() if name in stored and is_tensor(value) and value.is_floating_point() else value
        for name, value in zip(names, arguments, strict=False)
    ]
    expected = target(*wide)
    emitted = Lowered(folder, target, arguments, stored).run()
    pairs = list(zip(emitted, expected if isinstance(expected, tuple) else (expected,), strict=True))
    for result, other in pairs:
        assert result.dtype == other.dtype and result.shape == other.shape
    return pairs


def assert_equal(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for emitted, reference in pairs:
        assert torch.equal(emitted, reference), f"{(emitted != reference).sum()} of {emitted.numel()} differ"


def matmul_bound(x: Tensor, weight: Tensor) -> Tensor:
    """Two sums of k products, each in its own order: each within k units of the sum of magnitudes."""
    return 2 * x.shape[-1] * UNIT * (x.abs().double() @ weight.abs().double().T)
