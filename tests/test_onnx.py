"""The ONNX target: each operator against its fxq:: reference, then whole models, by operator and end to end."""

import copy
import functools
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
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
from fxquant.lowering.onnx.runner import OnnxRunner, products_saturate, session_options
from fxquant.lowering.onnx.shapes import DTYPES
from fxquant.models import DecoderLayer
from fxquant.passes import AssignSchemes, Calibrate, pipeline, run_passes
from fxquant.passes.surgery import Surgery
from fxquant.policy import load_policy, shipped_policies
from fxquant.program import Program
from fxquant.safetensors_file import read_header
from fxquant.trace import trace
from fxquant.trace_canonical import canonicalize
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
    for target, arguments in (
        (ops.linear, (x, weight)),
        (ops.linear, (x, weight, bias)),
        (ops.router_logits, (x, weight)),
    ):
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
        "pow": positive**1.5, "square": x**2, "power_of_scalar": 2**x, "sqrt": positive.sqrt(),
        "rsqrt": positive.rsqrt(),
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
        "squeeze": x.unsqueeze(1).squeeze(1), "squeeze_kept": x.squeeze(-1),
        "view": x.view(x.shape[0], x.shape[1], 2, 3),
        "reshape": x.reshape(-1, 6), "flatten": x.flatten(1), "flatten_front": x.flatten(0, 1),
        "unflatten": x.unflatten(-1, (3, -1)), "permute": x.permute(2, 0, 1), "transpose": x.transpose(-1, -2),
        "expand": x.unsqueeze(1).expand(-1, 4, -1, -1), "repeat": x.repeat(1, 2, 1), "unbind": x.unbind(-1)[3],
        "matmul": x @ other.transpose(-1, -2), "bmm": torch.bmm(x, other.transpose(1, 2)),
        "mm": torch.mm(x[0], x[0].t()), "layer_norm": nn.functional.layer_norm(x, (6,)), "size": x * x.shape[0],
        "bfloat16": x.bfloat16().float(), "int": (x * 10).int(), "to": x.to(torch.float32),
        "where": torch.where(x > 0, x, 0.0),
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
    program = Program(fx.GraphModule(nn.Module(), graph), {}, torch.float32)
    canonicalize(program)
    return program


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
        assert (
            torch.allclose(one, expected, rtol=1e-6, atol=3e-6)
            if one.is_floating_point()
            else torch.equal(one, expected)
        ), name


# whole models


@dataclass(frozen=True)
class Emitted:
    """A program, its weights as they are stored, and the folder with both."""

    program: Program
    read: Cached
    folder: Path

    @functools.cached_property
    def runner(self) -> OnnxRunner:
        return OnnxRunner(self.folder)


@functools.cache
def traced(folder: Path, layer: type[DecoderLayer]) -> Program:
    checkpoint = open_checkpoint(folder)
    return trace(meta_model(checkpoint, layer), checkpoint)


def quantized(checkpoint: Checkpoint, policy: str, layer: type[DecoderLayer] = DecoderLayer) -> Program:
    program, chosen = copy.deepcopy(traced(checkpoint.folder, layer)), load_policy(policy)
    ids = [random_ids(meta_model(checkpoint), 2, 16, seed) for seed in range(2)]
    run_passes(program, pipeline(AssignSchemes(chosen), Calibrate(chosen, Cached(checkpoint.read), lambda: ids)))
    return program


def emit(program: Program, checkpoint: Checkpoint, folder: Path) -> Emitted:
    """Two weight files and the model; a stored tensor of odd length moves some offsets off alignment."""
    made = RecipeReader(program, checkpoint)
    names = sorted({name for parameter in program.parameters.values() for name in parameter.names})
    tensors = {}
    for file in range(2):
        stored = {name: made(name).contiguous() for name in names[file::2]} | {"odd": torch.zeros(13, dtype=torch.int8)}
        save_file(stored, folder / f"weights-{file}.safetensors")
        tensors |= read_header(folder / f"weights-{file}.safetensors")
    write_onnx(program, tensors, folder)
    return Emitted(program, Cached(made), folder)


@pytest.fixture(scope="session")
def emitted(tiny: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Emitted]:
    """`emitted(policy, **checkpoint options)`, made once."""

    @functools.cache
    def make(policy: str, **options: Any) -> Emitted:
        checkpoint = tiny(**options)
        return emit(quantized(checkpoint, policy), checkpoint, tmp_path_factory.mktemp("onnx"))

    return make


def cached_inputs(program: Program, seed: int = 0) -> list[Tensor]:
    """Three rows of four new tokens after five, the second row left-padded by six: its first query sees nothing."""
    batch, sequence, past = 3, 4, 5
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    mask[1, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    ids = integers(0, 100, batch, sequence, dtype=torch.int64, seed=seed)
    caches = prefill_inputs(program, ids)[3:]
    return [ids, mask, positions, *(floats(batch, past, cache.shape[2], seed=seed + 1) for cache in caches)]


@torch.no_grad()
def node_values(one: Emitted, inputs: list[Tensor]) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}
    feeds = iter(inputs)
    for node in one.program.graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(feeds)
        elif node.op == "get_attr":
            values[node] = load(one.program, str(node.target), one.read)
        elif node.op == "call_function":
            values[node] = call(node, values.__getitem__)
    return values


def blocks(program: Program) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.graph.nodes:
        if node.op == "call_function":
            found.setdefault(node.meta["block"], []).append(node)
    return found


def bound(node: fx.Node, values: dict[fx.Node, Any]) -> Tensor | float:
    """How far an operator may be from its reference on equal inputs; zero where both round alike."""
    maker = node.args[0] if node.target is operator.getitem else node
    args = [values[arg] if isinstance(arg, fx.Node) else arg for arg in maker.args]
    value = values[node]
    if maker.target in (ops.linear, ops.router_logits):
        return matmul_bound(args[0], args[1])
    if maker.target == ops.rms_norm:
        return (args[0].shape[-1] + 12) * UNIT * value.abs()
    if maker.target == ops.swiglu:
        return 14 * UNIT * value.abs() + 1e-37
    if maker.target == ops.rope_table:
        return 8 * UNIT * max(1.0, args[2])
    if maker.target == ops.moe_gate and value.is_floating_point():
        return 24 * UNIT * value.abs()
    if maker.target == ops.moe_finalize_routing:
        return 2 * args[2].shape[-1] * UNIT * args[2].sum(-1, keepdim=True) * args[0].abs().max()
    if maker.target == ops.mla_attention:
        q, kv, k_rope, _, heads, _, scale = args
        width = q.shape[-1] // heads
        largest = scale * width * q.abs().max() * max(kv.abs().max(), k_rope.abs().max())
        return (2 * largest * (width + 2) + kv.shape[1] + 20) * UNIT * kv.abs().max()
    if maker.target == ops.moe_experts:
        # A product of products: relative error of k + n sums on each side, at the size of the largest output.
        return 2 * (args[0].shape[-1] + args[3][0].shape[0]) * UNIT * value.abs().max()
    if maker.target == ops.grouped_dequantize:
        return expert_bound(node, values)
    if maker.target == ATEN.mean.dim:
        return 2 * args[0].shape[-1] * UNIT * args[0].abs().max()
    return 8 * UNIT if maker.target in (ATEN.tanh.default, ATEN.sigmoid.default) else 0.0


def expert_bound(node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
    """Up to its second quantization an expert is exact but for swiglu, whose last bits may move a tie by one step.

    A step of one hidden feature moves the output by its scale times a weight, at most 127 steps of the largest.
    Two such steps a row are allowed, and 16 units for the scale itself.
    """
    _, x_scale, weight_scale, _ = (values[arg] for arg in node.args)
    step = max(scale.max() for scale in weight_scale)
    return 2 * x_scale * 127 * step + 16 * UNIT * values[node].abs()


def assert_operators_agree(one: Emitted, inputs: list[Tensor]) -> set[str]:
    """Feed every operator what the fx graph feeds it; → names of the values that were compared."""
    values = node_values(one, inputs)
    named = {node.name: value for node, value in values.items()}
    compared: set[str] = set()
    for nodes in blocks(one.program).values():
        session = operator_session(one.folder, [node.name for node in nodes])
        results = session(session.feeds(named))
        for node in nodes:
            if node.name in results:
                mine, reference = results[node.name], values[node]
                assert mine.dtype == reference.dtype and mine.shape == reference.shape, node.name
                off = (mine.double() - reference.double()).abs()
                assert (off <= bound(node, values)).all(), f"{node.name}: off by {off.max()}"
                compared.add(node.name)
    return compared


def assert_models_agree(one: Emitted, inputs: list[Tensor]) -> None:
    """The largest logit difference. Activation codes may flip by one step, and later layers amplify it: 1%."""
    expected = execute(one.program, one.read, [inputs])[0]
    ids, mask, positions, *past = inputs
    logits, presents = one.runner(ids, mask, positions, past)
    for mine, reference in zip([logits, *presents], expected, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == reference.shape
        assert (mine - reference).norm() <= 0.01 * reference.norm()


POLICIES = shipped_policies()
VARIANTS = [
    ("deepseek_w4a8", {"dtype": torch.float16}),
    ("deepseek_w4a8", {"attention_bias": True, "q_lora_rank": None}),
    ("deepseek_w4a8_dynamic", {"attention_bias": True}),
    ("float", {"dtype": torch.float32, "n_shared_experts": 0}),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(emitted: Callable[..., Emitted], policy: str):
    check_everything(emitted(policy))


@pytest.mark.parametrize(("policy", "options"), VARIANTS)
def test_variants(emitted: Callable[..., Emitted], policy: str, options: dict[str, Any]):
    check_everything(emitted(policy, **options))


def check_everything(one: Emitted) -> None:
    onnx.checker.check_model(one.folder / "model.onnx", full_check=True)
    compared = assert_operators_agree(one, cached_inputs(one.program))
    single = {n.name for nodes in blocks(one.program).values() for n in nodes if is_tensor(n.meta["val"])}
    inside = {name for name in single - compared if "_mlp_experts_" in name}
    assert single - compared == inside, "all but the inner values of routed experts can be taken out"
    assert_models_agree(one, cached_inputs(one.program, seed=3))
    assert_models_agree(one, prefill_inputs(one.program, integers(0, 100, 1, 1, dtype=torch.int64)))


def test_prefill_and_decode_generate_what_the_graph_generates(emitted: Callable[..., Emitted]):
    one = emitted("deepseek_w4a8")
    prompt = [5, 17, 3, 99, 42]
    mine, reference = list(one.runner.generate(prompt, 6)), list(generate(one.program, one.read, prompt, 6))
    assert len(mine) == 6
    for left, right in zip(mine, reference, strict=True):
        assert left.argmax() == right.argmax()
    logits, caches = one.runner.prefill(torch.tensor([prompt, prompt]))
    assert logits.shape[:2] == (2, 5) and [cache.shape[1] for cache in caches] == [5, 5]
    assert torch.allclose(logits[0, -1], mine[0], rtol=1e-4, atol=1e-4)
    assert not list(one.runner.generate(prompt, 0))


def test_weights_lie_in_their_files(emitted: Callable[..., Emitted]):
    one = emitted("deepseek_w4a8")
    model = onnx.load(one.folder / "model.onnx", load_external_data=False)
    infos = {}
    for file in ("weights-0.safetensors", "weights-1.safetensors"):
        infos |= read_header(one.folder / file)
    graphs = [model.graph]
    found = {}
    while graphs:
        graph = graphs.pop()
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
        found |= {tensor.name: tensor for tensor in graph.initializer}
    assert found.keys() == {name for p in one.program.parameters.values() for name in p.names}
    for name, tensor in found.items():
        place = {entry.key: entry.value for entry in tensor.external_data}
        info = infos[name]
        assert tensor.data_location == onnx.TensorProto.EXTERNAL and not tensor.raw_data
        assert place == {"location": info.file.name, "offset": str(info.start), "length": str(info.nbytes)}
    weights = sum((one.folder / f"weights-{file}.safetensors").stat().st_size for file in range(2))
    assert (one.folder / "model.onnx").stat().st_size < weights / 10


def test_the_model_says_what_it_is(emitted: Callable[..., Emitted]):
    model = onnx.load(emitted("deepseek_w4a8").folder / "model.onnx", load_external_data=False)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 21), ("fxquant", 1)]
    assert (model.ir_version, model.producer_name) == (10, "fxquant")
    notes = {prop.key: prop.value for prop in model.metadata_props}
    assert notes["producer"] == "fxquant" and "become int8 in memory" in notes["numerics"]
    inputs = {
        one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in model.graph.input
    }
    outputs = {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output}
    assert inputs == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        "past_key_values.0.latent": ["batch", "past", 40],
        "past_key_values.1.latent": ["batch", "past", 40],
    }
    assert outputs == {
        "logits": ["batch", "sequence", 128],
        "present.0.latent": ["batch", "total", 40],
        "present.1.latent": ["batch", "total", 40],
    }


MOE_LAYER = """
layers_1_mlp_gate_router_logits = router_logits
layers_1_mlp_gate = moe_gate
layers_1_mlp_experts_init_routing = moe_init_routing
layers_1_mlp_experts_down_proj = CumSum Sub Greater Split If Concat
layers_1_mlp_experts = moe_finalize_routing
layers_1_mlp_shared_experts_gate_proj_input_int8 = quantize_static
layers_1_mlp_shared_experts_gate_proj_int32 = int_matmul
layers_1_mlp_shared_experts_gate_proj = dequantize_static
layers_1_mlp_shared_experts_up_proj_input_int8 = quantize_static
layers_1_mlp_shared_experts_up_proj_int32 = int_matmul
layers_1_mlp_shared_experts_up_proj = dequantize_static
layers_1_mlp_shared_experts_swiglu = swiglu
layers_1_mlp_shared_experts_down_proj_input_int8 = quantize_static
layers_1_mlp_shared_experts_down_proj_int32 = int_matmul
layers_1_mlp_shared_experts_down_proj = dequantize_static
layers_1_mlp_add = Add
"""
EXPERT = """
[0] = quantize_per_token(rows)
[1] = int4_matmul([0], gate_proj_weight, gate_proj_weight_scale_second)
[2] = dequantize_per_token([1], [0], gate_proj_weight_scale)
[3] = int4_matmul([0], up_proj_weight, up_proj_weight_scale_second)
[4] = dequantize_per_token([3], [0], up_proj_weight_scale)
[5] = swiglu([2], [4])
[6] = quantize_per_token([5])
[7] = int4_matmul([6], down_proj_weight, down_proj_weight_scale_second)
[8] = dequantize_per_token([7], [6], down_proj_weight_scale)
"""


def test_the_graph_mirrors_the_fx_graph(emitted: Callable[..., Emitted]):
    model = onnx.load(emitted("deepseek_w4a8").folder / "model.onnx", load_external_data=False)
    units: dict[str, list[str]] = {}
    for node in model.graph.node:
        units.setdefault(node.name.partition("/")[0], []).append(node.op_type)
    lines = (
        f"{name} = {' '.join(dict.fromkeys(t for t in types if t != 'Constant'))}" for name, types in units.items()
    )
    assert "\n" + "\n".join(line for line in lines if line.startswith("layers_1_mlp")) + "\n" == MOE_LAYER
    function = next(one for one in model.functions if one.name == "routed_expert")
    calls = [node for node in function.node if node.domain == DOMAIN]
    made = {output: f"[{index}]" for index, node in enumerate(calls) for output in node.output}
    made |= {node.output[0]: node.input[0] for node in function.node if node.op_type == "Cast"}
    text = [f"[{i}] = {n.op_type}({', '.join(made.get(x, x) for x in n.input)})" for i, n in enumerate(calls)]
    assert "\n" + "\n".join(text) + "\n" == EXPERT
    assert sum(one.name.startswith("routed_expert") for one in model.functions) == 1


def test_integers_stay_integers_when_onnxruntime_has_optimized(emitted: Callable[..., Emitted], tmp_path: Path):
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(emitted("deepseek_w4a8_shared_w4").folder / "model.onnx", options)
    model = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    branch = next(node for node in model.graph.node if node.op_type == "If")
    then = next(attribute.g for attribute in branch.attribute if attribute.name == "then_branch")
    assert [node.op_type for node in then.node].count("MatMulInteger") == 3
    for graph in (model.graph, then):
        dtypes = {one.name: one.data_type for one in graph.initializer}
        products = [node for node in graph.node if node.op_type == "MatMulInteger"]
        assert products and all(dtypes[node.input[1]] == onnx.TensorProto.INT8 for node in products)
        assert onnx.TensorProto.INT4 not in dtypes.values(), "unpacked once, when the session is made"


def test_the_probe_sees_saturation(monkeypatch: pytest.MonkeyPatch):
    assert products_saturate() in (False, True)
    lossy = lambda *_, **__: SimpleNamespace(run=lambda *_: [np.full((4, 16), 64 * 32767 // 2)])  # noqa: E731
    monkeypatch.setattr(onnxruntime, "InferenceSession", lossy)
    assert products_saturate.__wrapped__()


def test_same_program_same_bytes(emitted: Callable[..., Emitted], tiny: Callable[..., Checkpoint], tmp_path: Path):
    again = emit(quantized(tiny(), "deepseek_w4a8"), tiny(), tmp_path)
    assert (again.folder / "model.onnx").read_bytes() == (emitted("deepseek_w4a8").folder / "model.onnx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.onnx",
        "weights-0.safetensors",
        "weights-1.safetensors",
    ]


# research variants


class Research(DecoderLayer):
    """A layer with a parameter of its own and plain torch operators around the attention."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config, index)
        self.scale = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        y, present = super().forward(torch.tanh(x / 8) * 8, *rest)
        gate = torch.sigmoid(x.mean(-1, keepdim=True)).expand(-1, -1, x.shape[-1])
        heads = y.view(y.shape[0], y.shape[1], 4, -1).clamp(-4, 4).flatten(-2)
        return x + heads * gate * self.scale, present


def test_a_subclass_with_its_own_operators(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    tensors = stored_tensors(random_tensors(tiny_config(torch_dtype="bfloat16"), 0), torch.bfloat16, fp8=False)
    own = {f"model.layers.{index}.scale": floats(256, seed=index).bfloat16() for index in range(2)}
    write_shards(folder, tensors | own)
    checkpoint = open_checkpoint(folder)
    policy = tmp_path / "research.yaml"
    policy.write_text("extends: deepseek_w4a8\nrules:\n  - {kind: other, scheme: FLOAT}\n")
    program = quantized(checkpoint, str(policy), Research)
    check_everything(emit(program, checkpoint, tmp_path))


class Unsupported(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x.roll(1, -1), *rest)


def test_an_operator_without_onnx_form_is_named(tiny: Callable[..., Checkpoint], tmp_path: Path):
    program = quantized(tiny(), "deepseek_w4a8_dynamic", Unsupported)
    fact = r"layers_0_roll \(model.layers.0\): aten.roll.default has no ONNX form. Write it with the operators of"
    with pytest.raises(FxquantError, match=fact):
        emit(program, tiny(), tmp_path)
    assert not (tmp_path / "model.onnx").exists()


def insert_after(program: Program, name: str, target: Any, *args: Any) -> fx.Node:
    """Put `target(node, *args)` between the node of that name and its users."""
    node = next(one for one in program.graph.graph.nodes if one.name == name)
    users = list(node.users)
    added = Surgery(program, users[0]).call(target, (node, *args), f"{name}_{target._opname}")
    for user in users:
        user.replace_input_with(node, added)
    return added


def test_an_operator_between_the_experts_is_part_of_them(tiny: Callable[..., Checkpoint], tmp_path: Path):
    program = quantized(tiny(), "deepseek_w4a8")
    insert_after(program, "layers_1_mlp_experts_swiglu", ATEN.clamp.default, -0.2, 0.2)
    insert_after(program, "layers_1_mlp_experts_rows", ATEN.mul.Tensor, 1.5)
    insert_after(program, "layers_1_mlp_experts_up_proj_int32", ATEN.clamp.default, -9000, 9000)
    insert_after(program, "layers_1_mlp_experts_rows_int8", ATEN.clamp.default, -100, 100)
    one = emit(program, tiny(), tmp_path)
    check_everything(one)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    function = next(one for one in model.functions if one.name == "routed_expert")
    assert [node.op_type for node in function.node].count("Clip") == 3


def test_rows_of_several_experts_may_not_mix(tiny: Callable[..., Checkpoint], tmp_path: Path):
    program = quantized(tiny(), "deepseek_w4a8")
    insert_after(program, "layers_1_mlp_experts_swiglu", ATEN.softmax.int, 0)
    with pytest.raises(FxquantError, match="softmax.int mixes the rows of several experts"):
        emit(program, tiny(), tmp_path)


def test_int8_values_under_other_operators(tiny: Callable[..., Checkpoint], tmp_path: Path):
    program = quantized(tiny(), "deepseek_w4a8")
    insert_after(program, "layers_0_mlp_swiglu_int8", ATEN.clamp.default, -50, 60)
    insert_after(program, "layers_0_post_attention_layernorm_int8", ATEN.slice.Tensor, -1, 0, 256)
    check_everything(emit(program, tiny(), tmp_path))


def test_few_tokens_leave_experts_empty(emitted: Callable[..., Emitted]):
    for policy in ("deepseek_w4a8", "float"):
        one = emitted(policy)
        ids = integers(0, 100, 1, 1, dtype=torch.int64, seed=7)
        assert_operators_agree(one, prefill_inputs(one.program, ids))


def test_missing_weights_are_named(tiny: Callable[..., Checkpoint], tmp_path: Path):
    program = quantized(tiny(), "deepseek_w4a8_dynamic")
    with pytest.raises(FxquantError, match=r"model\.embed_tokens\.weight: is read by the graph and not in the weight"):
        write_onnx(program, {}, tmp_path)


def test_a_folder_without_model_is_named(tmp_path: Path):
    with pytest.raises(FxquantError, match=r"model\.onnx: no such file\. Compile with --target onnx"):
        OnnxRunner(tmp_path)
