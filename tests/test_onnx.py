"""The ONNX target: each operator against its fxq:: reference, then whole models, operator by operator and end to end."""

import functools
import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from tiny import meta_model, random_ids, random_tensors, stored_tensors, tiny_config, write_checkpoint, write_shards
from torch import Tensor, fx, nn
from torch.export import Dim

from fxquant import ops
from fxquant.checkpoint import Checkpoint, open_checkpoint
from fxquant.errors import FxquantError
from fxquant.execute import call, execute, generate, prefill_inputs
from fxquant.lowering.onnx import write_onnx
from fxquant.lowering.onnx.builder import DOMAIN, OPSET, Builder
from fxquant.lowering.onnx.extract import EXTERNAL_FOLDER, operator_session
from fxquant.lowering.onnx.function_table import FunctionTable
from fxquant.lowering.onnx.functions import BODIES
from fxquant.lowering.onnx.initializers import View, external
from fxquant.lowering.onnx.node_lowering import VIEWS
from fxquant.lowering.onnx.runner import OnnxRunner, session_options
from fxquant.lowering.onnx.shapes import DTYPES
from fxquant.models import DecoderLayer
from fxquant.passes import AssignSchemes, Calibrate, pipeline, run_passes
from fxquant.passes.surgery import Surgery
from fxquant.policy import load_policy, shipped_policies
from fxquant.program import Program
from fxquant.safetensors_file import read_header
from fxquant.trace import trace
from fxquant.weights import Cached, RecipeReader, load

ATEN = torch.ops.aten
UNIT = 2.0**-24
"""Half a step of float32 at 1: one rounding moves a value by at most this fraction."""


def floats(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def int8(*shape: int, seed: int = 0) -> Tensor:
    return integers(-128, 128, *shape, seed=seed)


# one operator at a time


class Lowered:
    """The local function of one dialect operator as a model; parameters named in `stored` lie in a weight file."""

    def __init__(self, folder: Path, target: Any, arguments: tuple, stored: tuple[str, ...]) -> None:
        names = [argument.name for argument in target._schema.arguments]
        bound = dict(itertools.zip_longest(names, arguments))
        save_file({name: bound[name].contiguous() for name in stored if is_tensor(bound.get(name))}, folder / "w.safetensors")
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
    return torch.from_numpy(value.astype(np.int16) - 128).to(torch.int8) if value.dtype == np.uint8 else torch.from_numpy(value)


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
    for one, other in pairs:
        assert one.dtype == other.dtype and one.shape == other.shape
    return pairs


def assert_equal(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for one, other in pairs:
        assert torch.equal(one, other), f"{(one != other).sum()} of {one.numel()} differ"


STORED_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_quantize_static_rounds_the_sum_as_the_reference(tmp_path: Path, dtype: torch.dtype):
    scale, offset = torch.tensor([0.0371]).to(dtype), torch.tensor([-3.0]).to(dtype)
    ties = (torch.arange(-300, 300) + 0.5) * scale.float()
    x = torch.cat((ties, floats(1000, scale=5), torch.tensor([0.0, -0.0, 1e30, -1e30]))).view(2, -1)
    pairs = both(tmp_path, ops.quantize_static, x, scale, offset, stored=("input_scale", "input_offset"))
    assert_equal(pairs)
    assert pairs[0][0].min() == -128 and pairs[0][0].max() == 127


def test_quantize_static_is_not_one_quantize_linear(tmp_path: Path):
    # x / scale = 2**-25 vanishes beside an offset of 0.5 only if the sum is rounded: rne(0.5) = 0.
    x, scale, offset = torch.tensor([[2.0**-25]]), torch.tensor([1.0]), torch.tensor([0.5])
    assert_equal(both(tmp_path, ops.quantize_static, x, scale, offset, stored=("input_scale", "input_offset")))


def test_quantize_per_token_is_bit_identical(tmp_path: Path):
    rows = [floats(64, seed=seed, scale=10.0**power) for seed, power in enumerate(range(-30, 30, 3))]
    ties = torch.arange(64) + 0.5
    rows += [torch.zeros(64), torch.full((64,), 1e-35), ties - 32, torch.full((64,), -3.0), floats(64) * 1e-40]
    assert_equal(both(tmp_path, ops.quantize_per_token, torch.stack(rows)))
    assert_equal(both(tmp_path, ops.quantize_per_token, floats(200, 7, 33)))


@pytest.mark.parametrize("k", [2, 7, 64, 2048])
def test_int_matmul_is_exact_at_the_extremes(tmp_path: Path, k: int):
    x = torch.cat((int8(5, k), torch.full((1, k), -128), torch.full((1, k), 127))).to(torch.int8)
    weight = torch.cat((int8(6, k, seed=1), torch.full((1, k), -128), torch.full((1, k), 127))).to(torch.int8)
    assert_equal(both(tmp_path, ops.int_matmul, x, weight, stored=("weight",)))
    assert_equal(both(tmp_path, ops.int_matmul, x.view(1, 7, k), weight, stored=("weight",)))


@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
def test_int4_matmul_reads_the_packed_bytes(tmp_path: Path, group_size: int):
    x, weight = int8(5, 128), int8(12, 128, seed=1)
    second = integers(1, 16, 24, 128 // group_size, dtype=torch.int32).float() if group_size else None
    pairs = both(tmp_path, ops.int4_matmul, x, weight, second, stored=("weight", "weight_scale_second"))
    assert_equal(pairs)


@pytest.mark.parametrize("packed", [False, True])
def test_dequantize_static_reads_both_forms_of_deq_scale(tmp_path: Path, packed: bool):
    acc, bias = integers(-(2**23), 2**23, 3, 5, 16, dtype=torch.int32), integers(-9999, 9999, 16, dtype=torch.int32)
    scale = floats(16).abs() / 1000
    stored = scale.view(torch.int32).long() if packed else scale
    names = ("deq_scale", "quant_bias")
    assert_equal(both(tmp_path, ops.dequantize_static, acc, stored, bias, stored=names))


@pytest.mark.parametrize("dtype", [None, *STORED_DTYPES])
def test_dequantize_per_token(tmp_path: Path, dtype: torch.dtype | None):
    acc, x_scale = integers(-(2**23), 2**23, 3, 5, 16, dtype=torch.int32), floats(3, 5, 1).abs()
    weight_scale, bias = floats(16, 1).abs(), floats(16).to(dtype) if dtype else None
    arguments = (acc, x_scale, weight_scale, bias)
    assert_equal(both(tmp_path, ops.dequantize_per_token, *arguments, stored=("weight_scale", "bias")))


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_embedding(tmp_path: Path, dtype: torch.dtype):
    weight, ids = floats(10, 8).to(dtype), integers(0, 10, 3, 4, dtype=torch.int64)
    assert_equal(both(tmp_path, ops.embedding, weight, ids, stored=("weight",)))


def matmul_bound(x: Tensor, weight: Tensor) -> Tensor:
    """Two sums of k products, each in its own order: each within k units of the sum of magnitudes."""
    return 2 * x.shape[-1] * UNIT * (x.abs().double() @ weight.abs().double().T)


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_linear_and_router_logits(tmp_path: Path, dtype: torch.dtype):
    x, weight, bias = floats(3, 5, 64), floats(16, 64, seed=1).to(dtype), floats(16, seed=2).to(dtype)
    for target, arguments in ((ops.linear, (x, weight)), (ops.linear, (x, weight, bias)), (ops.router_logits, (x, weight))):
        ((one, other),) = both(tmp_path, target, *arguments, stored=("weight", "bias"))
        assert ((one - other).abs() <= matmul_bound(x, weight.float()) + 2 * UNIT * other.abs()).all()


@pytest.mark.parametrize("biased", [False, True])
def test_rms_norm(tmp_path: Path, biased: bool):
    x, weight = floats(3, 5, 64, scale=3), floats(64, seed=1).bfloat16()
    bias = floats(64, seed=2).bfloat16() if biased else None
    ((one, other),) = both(tmp_path, ops.rms_norm, x, weight, 1e-6, bias, stored=("weight", "bias"))
    # The mean of k squares is within k units, its root within half; six more roundings on each side.
    limit = (64 + 12) * UNIT * (other.abs() + (bias.float().abs() if bias is not None else 0))
    assert ((one - other).abs() <= limit).all()


def test_swiglu_at_any_magnitude(tmp_path: Path):
    gate = torch.cat((floats(4, 64), floats(4, 64, scale=100), torch.full((1, 64), -200.0), torch.full((1, 64), 90.0)))
    ((one, other),) = both(tmp_path, ops.swiglu, gate, floats(10, 64, seed=1))
    # Two libraries' exp, each within two units in the last place; three roundings on each side.
    assert ((one - other).abs() <= 14 * UNIT * other.abs() + 1e-37).all()


def test_rope_table(tmp_path: Path):
    inv_freq = [1.0, 0.1, 0.01, 0.001]
    positions = torch.stack((torch.arange(50), torch.arange(50) * 997))
    # Same angles; each cosine within a unit in the last place of at most 1.25.
    for one, other in both(tmp_path, ops.rope_table, positions, inv_freq, 1.25):
        assert ((one - other).abs() <= 8 * UNIT).all()


@pytest.mark.parametrize(("num_heads", "head"), [(4, 24), (1, 8), (2, 8)])
def test_rope_is_exact(tmp_path: Path, num_heads: int, head: int):
    cos, sin = ops.rope_table(torch.arange(10).view(2, 5), [1.0, 0.3, 0.1, 0.03], 1.0)
    assert_equal(both(tmp_path, ops.rope, floats(2, 5, num_heads * head), cos, sin, num_heads))


def test_mla_attention_masks_and_averages(tmp_path: Path):
    # Three queries over five keys; the second batch row begins with padding, the third is padding throughout.
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    q, kv, k_rope = floats(3, 3, 4 * 12), floats(3, 5, 4 * 24, seed=1), floats(3, 5, 4, seed=2)
    ((one, other),) = both(tmp_path, ops.mla_attention, q, kv, k_rope, mask, 4, 16, 0.25)
    # Scores below 20 over 12 products, so exponents within 20 * 24 units, twice; then a sum of five values.
    assert ((one - other).abs() <= (2 * 20 * 24 + 20) * UNIT * kv.abs().max()).all()


@pytest.mark.parametrize(("n_group", "normed"), [(4, True), (4, False), (1, True), (16, True)])
def test_moe_gate(tmp_path: Path, n_group: int, normed: bool):
    logits, bias = floats(3, 7, 16), floats(16, seed=1, scale=0.1)
    kept = min(2, n_group)
    arguments = (logits, bias, min(3, kept * 16 // n_group), n_group, kept, normed, 2.5)
    ids, weights = both(tmp_path, ops.moe_gate, *arguments, stored=("correction_bias",))
    assert_equal([ids])
    # Two sigmoids within four units, a sum of up to three and two more roundings.
    assert ((weights[0] - weights[1]).abs() <= 24 * UNIT * weights[1]).all()


def test_moe_gate_breaks_ties_towards_lower_experts(tmp_path: Path):
    logits = torch.cat((torch.zeros(1, 16), floats(40, 16).round(), floats(2, 16, scale=200)))
    ids, _ = both(tmp_path, ops.moe_gate, logits, torch.zeros(16), 4, 4, 2, True, 1.0, stored=("correction_bias",))
    assert_equal([ids])
    assert ids[0][0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_routing_there_and_back(tmp_path: Path, tokens: int):
    x, ids = floats(2, tokens, 8), integers(0, 6, 2, tokens, 3, dtype=torch.int64)
    pairs = both(tmp_path, ops.moe_init_routing, x, ids, 7)
    assert_equal(pairs)
    rows, row_index = pairs[0][1], pairs[1][1]
    weights = floats(2, tokens, 3).abs()
    ((one, other),) = both(tmp_path, ops.moe_finalize_routing, rows, row_index, weights)
    # Three products and their sum, on each side.
    assert ((one - other).abs() <= 10 * UNIT * (weights.sum(-1, keepdim=True) * x.abs())).all()


def test_one_function_for_each_set_of_constants():
    x = ir.Value(name="x", shape=ir.Shape([None, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name="weight", shape=ir.Shape([8]), type=ir.TensorType(ir.DataType.FLOAT))
    table = FunctionTable()
    first, again, other = (
        table.get("rms_norm", BODIES[ops.rms_norm], {"x": x, "weight": weight, "eps": eps, "bias": None})
        for eps in (1e-6, 1e-6, 1e-5)
    )
    assert first is again and [function.name for function in table.functions] == ["rms_norm", "rms_norm_1"]
    assert other is table.functions[1]


# aten operators


def expressions(x: Tensor) -> dict[str, Tensor]:
    """x [batch, 11, 6] after positive parts: what a block may be written with, by name."""
    positive, other = x.abs() + 0.5, x * 0.5 + 0.25
    parts, pieces = x.split([2, 4], -1), x.chunk(3, -1)
    first, second = x.split(4, -1)
    values, indices = x.topk(3, -1)
    return {
        "add": x + other, "add_scalar": x + 1.5, "add_alpha": torch.add(x, other, alpha=2), "sub": x - other,
        "rsub": 1 - x, "mul": x * other, "mul_scalar": x * 3, "div": x / positive, "div_scalar": x / 3, "neg": -x,
        "pow": positive**1.5, "square": x**2, "power_of_scalar": 2**x, "sqrt": positive.sqrt(), "rsqrt": positive.rsqrt(),
        "exp": x.exp(), "log": positive.log(), "tanh": x.tanh(), "sigmoid": x.sigmoid(), "abs": x.abs(),
        "silu": nn.functional.silu(x), "gelu": nn.functional.gelu(x), "softplus": nn.functional.softplus(x),
        "gelu_tanh": nn.functional.gelu(x, approximate="tanh"), "relu": x.relu(), "sin": x.sin(), "cos": x.cos(),
        "erf": x.erf(), "reciprocal": positive.reciprocal(), "round": (x * 4).round(), "floor": x.floor(),
        "clamp": x.clamp(-0.5, 0.5), "clamp_min": x.clamp(min=0.1), "clamp_max": x.clamp_max(0.3),
        "maximum": torch.maximum(x, other), "minimum": torch.minimum(x, other), "mean": x.mean(-1),
        "mean_keep": x.mean((1, 2), keepdim=True), "sum": x.sum(-1, keepdim=True), "sum_two": x.sum((0, 2)),
        "amax": x.amax(-1), "amin": x.amin(1), "softmax": x.softmax(-1), "log_softmax": x.log_softmax(1),
        "cumsum": x.cumsum(1), "cat": torch.cat((x, other), -1), "stack": torch.stack((x, other), 1),
        "split_sizes": parts[1], "split": first * second.sum(-1, keepdim=True), "chunk": pieces[0] - pieces[2],
        "slice": x[:, 2:5], "slice_step": x[..., ::2], "select": x[:, -1], "unsqueeze": x.unsqueeze(1),
        "squeeze": x.unsqueeze(1).squeeze(1), "squeeze_kept": x.squeeze(-1), "view": x.view(x.shape[0], x.shape[1], 2, 3),
        "reshape": x.reshape(-1, 6), "flatten": x.flatten(1), "flatten_front": x.flatten(0, 1),
        "unflatten": x.unflatten(-1, (3, -1)), "permute": x.permute(2, 0, 1), "transpose": x.transpose(-1, -2),
        "expand": x.unsqueeze(1).expand(-1, 4, -1, -1), "repeat": x.repeat(1, 2, 1), "unbind": x.unbind(-1)[3],
        "matmul": x @ other.transpose(-1, -2), "bmm": torch.bmm(x, other.transpose(1, 2)),
        "mm": torch.mm(x[0], x[0].t()), "layer_norm": nn.functional.layer_norm(x, (6,)), "size": x * x.shape[0],
        "bfloat16": x.bfloat16().float(), "int": (x * 10).int(), "to": x.to(torch.float32), "where": torch.where(x > 0, x, 0.0),
        "masked_fill": x.masked_fill(other < 0.3, -1.0), "logical": ((x > 0) & (other <= 0.5)) | ~(x == 0),
        "ones_like": torch.ones_like(x) + torch.zeros_like(x), "full": torch.full_like(x, 2.5), "topk": values,
        "topk_indices": indices, "argmax": x.argmax(-1), "gather": x.gather(-1, indices), "type_as": indices.type_as(x),
        "int_add": indices + 2, "int_div": indices / 2, "compare_int": indices > 1.5,
    }  # fmt: skip


class Expressions(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Tensor) -> list[Tensor]:
        return list(expressions(past).values())


@functools.cache
def expression_program() -> Program:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    batch, sequence, total = Dim("batch"), Dim("sequence"), Dim("total")
    shapes = ({0: batch, 1: sequence}, {0: batch, 1: total}, {0: batch, 1: sequence}, {0: batch, 1: Dim("past", min=5)})
    arguments = (ids, torch.zeros(2, 8, dtype=torch.int64), ids.clone(), floats(2, 11, 6))
    graph = torch.export.export(Expressions(), arguments, dynamic_shapes=shapes, strict=False).graph
    return Program(fx.GraphModule(nn.Module(), graph), {}, torch.float32)


def test_aten_operators(tmp_path: Path):
    program = expression_program()
    write_onnx(program, {}, tmp_path)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    x = floats(3, 11, 6, seed=5)
    ids = torch.zeros(3, 1, dtype=torch.int64)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", session_options())
    feeds = {"input_ids": ids, "attention_mask": ids, "position_ids": ids, "past_key_values.0.latent": x}
    emitted = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    for (name, expected), value in zip(expressions(x).items(), emitted, strict=True):
        one = torch.from_numpy(value)
        assert one.dtype == expected.dtype and one.shape == expected.shape, name
        # Values are below ten, sums have at most 77 terms; functions are within a few units of their result.
        assert torch.allclose(one, expected, rtol=1e-6, atol=3e-6) if one.is_floating_point() else torch.equal(one, expected), name
