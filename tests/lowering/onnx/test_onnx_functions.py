"""The ONNX target: the local function of each operator against its fxq:: reference."""

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from onnx_calls import UNIT, assert_equal, both, floats, int8, integers, matmul_bound

from fxquant import ops
from fxquant.lowering.onnx.function_table import FunctionTable
from fxquant.lowering.onnx.functions import BODIES

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


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_linear_and_router_logits(tmp_path: Path, dtype: torch.dtype):
    x, weight, bias = floats(3, 5, 64), floats(16, 64, seed=1).to(dtype), floats(16, seed=2).to(dtype)
    for target, arguments in (
        (ops.linear, (x, weight)),
        (ops.linear, (x, weight, bias)),
        (ops.router_logits, (x, weight)),
    ):
        ((emitted, reference),) = both(tmp_path, target, *arguments, stored=("weight", "bias"))
        assert ((emitted - reference).abs() <= matmul_bound(x, weight.float()) + 2 * UNIT * reference.abs()).all()


@pytest.mark.parametrize("biased", [False, True])
def test_rms_norm(tmp_path: Path, biased: bool):
    x, weight = floats(3, 5, 64, scale=3), floats(64, seed=1).bfloat16()
    bias = floats(64, seed=2).bfloat16() if biased else None
    ((emitted, reference),) = both(tmp_path, ops.rms_norm, x, weight, 1e-6, bias, stored=("weight", "bias"))
    # The mean of k squares is within k units, its root within half; six more roundings on each side.
    limit = (64 + 12) * UNIT * (reference.abs() + (bias.float().abs() if bias is not None else 0))
    assert ((emitted - reference).abs() <= limit).all()


def test_swiglu_at_any_magnitude(tmp_path: Path):
    gate = torch.cat((floats(4, 64), floats(4, 64, scale=100), torch.full((1, 64), -200.0), torch.full((1, 64), 90.0)))
    ((emitted, reference),) = both(tmp_path, ops.swiglu, gate, floats(10, 64, seed=1))
    # Two libraries' exp, each within two units in the last place; three roundings on each side.
    assert ((emitted - reference).abs() <= 14 * UNIT * reference.abs() + 1e-37).all()


def test_rope_table(tmp_path: Path):
    inv_freq = [1.0, 0.1, 0.01, 0.001]
    positions = torch.stack((torch.arange(50), torch.arange(50) * 997))
    # Same angles; each cosine within a unit in the last place of at most 1.25.
    for emitted, reference in both(tmp_path, ops.rope_table, positions, inv_freq, 1.25):
        assert ((emitted - reference).abs() <= 8 * UNIT).all()


@pytest.mark.parametrize(("num_heads", "head"), [(4, 24), (1, 8), (2, 8)])
def test_rope_is_exact(tmp_path: Path, num_heads: int, head: int):
    cos, sin = ops.rope_table(torch.arange(10).view(2, 5), [1.0, 0.3, 0.1, 0.03], 1.0)
    assert_equal(both(tmp_path, ops.rope, floats(2, 5, num_heads * head), cos, sin, num_heads))


def test_mla_attention_masks_and_averages(tmp_path: Path):
    # Three queries over five keys; the second batch row begins with padding, the third is padding throughout.
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    q, kv, k_rope = floats(3, 3, 4 * 12), floats(3, 5, 4 * 24, seed=1), floats(3, 5, 4, seed=2)
    ((emitted, reference),) = both(tmp_path, ops.mla_attention, q, kv, k_rope, mask, 4, 16, 0.25)
    # Scores below 20 over 12 products, so exponents within 20 * 24 units, twice; then a sum of five values.
    assert ((emitted - reference).abs() <= (2 * 20 * 24 + 20) * UNIT * kv.abs().max()).all()


@pytest.mark.parametrize(("n_group", "normed"), [(4, True), (4, False), (1, True), (16, True)])
def test_moe_gate(tmp_path: Path, n_group: int, normed: bool):
    logits, bias = floats(3, 7, 16), floats(16, seed=1, scale=0.1)
    selected = min(2, n_group)
    arguments = (logits, bias, min(3, selected * 16 // n_group), n_group, selected, normed, 2.5)
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
    ((emitted, reference),) = both(tmp_path, ops.moe_finalize_routing, rows, row_index, weights)
    # Three products and their sum, on each side.
    assert ((emitted - reference).abs() <= 10 * UNIT * (weights.sum(-1, keepdim=True) * x.abs())).all()


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
