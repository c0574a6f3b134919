"""Float operators against slow float64 references, and every operator's shape rule against what it computes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxquant import ops

U = 2.0**-24
"""Half a step of float32 relative to the value: the most one rounding moves a result."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


X, X8, IDS = normal(2, 3, 8), integers(-128, 127, 2, 3, 8), integers(0, 3, 2, 3, 2, dtype=torch.int64)
ROWS8, COUNTS = integers(-128, 127, 5, 8), torch.tensor([2, 0, 3])
TABLE = (normal(2, 3, 4), normal(2, 3, 4, seed=1))
PAGES, LENGTHS = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)
EXPERT = integers(-128, 127, 4, 4, 8), normal(4, 8, 1), torch.ones(4, 8, 2)
"""int4 weights and scales of experts with as many features inside as outside."""
CASES = [
    (ops.embedding, (normal(7, 8), IDS)),
    (ops.linear, (X, normal(5, 8))),
    (ops.linear, (X.bfloat16(), normal(5, 8).bfloat16(), normal(5).bfloat16())),
    (ops.linear, (X.transpose(0, 1), normal(5, 8))),
    (ops.rms_norm, (X, normal(8), 1e-6)),
    (ops.rms_norm, (X.bfloat16(), normal(8).bfloat16(), 1e-6, normal(8))),
    (ops.swiglu, (X.half(), X.half())),
    (ops.rope_table, (IDS[..., 0], [1.0, 0.25], 1.5)),
    (ops.rope, (X.bfloat16(), *TABLE, 2)),
    (ops.mla_attention, (X, normal(2, 4, 12), normal(2, 4, 1), torch.ones(2, 4, dtype=torch.int64), 2, 3, 0.5)),
    (ops.router_logits, (X.bfloat16(), normal(4, 8).bfloat16())),
    (ops.attend_latents, (X, normal(2, 4, 5), normal(2, 4, 1), normal(12, 5), torch.ones(2, 4).long(), 2, 3, 0.5)),
    (ops.attend_halves, (X, *normal(2, 2, 1, 4, 3), normal(12, 5), torch.ones(2, 4).long(), 2, 3, 0.5)),
    (ops.expand_heads, (normal(2, 4, 12), normal(2, 4, 1), 2, 3)),
    (ops.attend_heads, (X, normal(2, 2, 4, 4), normal(2, 2, 4, 3), torch.ones(2, 4).long(), 0.5)),
    (ops.moe_gate, (normal(2, 3, 8), normal(8), 3, 4, 2, True, 2.5)),
    (ops.moe_experts, (X, IDS, normal(2, 3, 2), normal(4, 6, 8), normal(4, 6, 8), normal(4, 8, 6))),
    (ops.moe_init_routing, (X.bfloat16(), IDS, 4)),
    (ops.moe_finalize_routing, (normal(12, 8), torch.arange(12), normal(2, 3, 2))),
    (ops.quantize_static, (X.bfloat16(), torch.tensor([0.1]).bfloat16(), torch.tensor([3.0]).bfloat16())),
    (ops.quantize_per_token, (X.bfloat16(),)),
    (ops.int_matmul, (X8, integers(-128, 127, 5, 8))),
    (ops.int4_matmul, (X8, integers(-128, 127, 3, 8))),
    (ops.int4_matmul, (X8, integers(-128, 127, 3, 8), torch.ones(6, 2))),
    (ops.dequantize_static, (integers(-999, 999, 2, 3, 5, dtype=torch.int32), normal(5), torch.ones(5).int())),
    (ops.dequantize_per_token, (integers(-999, 999, 2, 3, 5, dtype=torch.int32), normal(2, 3, 1), normal(5, 1))),
    (ops.dequantize_per_token, (torch.ones(2, 5).int(), normal(2, 1), normal(5, 1), normal(5).bfloat16())),
    (ops.grouped_int_matmul, (ROWS8, integers(-128, 127, 3, 5, 8), COUNTS)),
    (ops.grouped_int4_matmul, (ROWS8, integers(-128, 127, 3, 2, 8), COUNTS)),
    (ops.grouped_int4_matmul, (ROWS8, integers(-128, 127, 3, 2, 8), COUNTS, torch.ones(3, 4, 2))),
    (
        ops.static_linear,
        (X, integers(-128, 127, 5, 8), torch.ones(1), torch.ones(1), normal(5), torch.ones(5).int(), False),
    ),
    (ops.per_token_linear, (X8, normal(2, 3, 1), integers(-128, 127, 5, 8), normal(5, 1), normal(5))),
    (ops.per_token_int4_linear, (X8, normal(2, 3, 1), integers(-128, 127, 3, 8), normal(6, 1), torch.ones(6, 2))),
    (ops.grouped_linear, (ROWS8, normal(5, 1), integers(-128, 127, 3, 5, 8), normal(3, 5, 1), COUNTS)),
    (
        ops.grouped_int4_linear,
        (ROWS8, normal(5, 1), integers(-128, 127, 3, 2, 8), normal(3, 4, 1), COUNTS, torch.ones(3, 4, 2)),
    ),
    (ops.block_linear, (X, integers(-128, 127, 3, 8), normal(6, 1), torch.ones(6, 2), normal(6), 4, 0)),
    (ops.block_linear, (X, integers(-128, 127, 3, 8), normal(6, 1), None, None, 8, 4)),
    (ops.block_experts, (X, IDS, normal(2, 3, 2), *EXPERT, *EXPERT, *EXPERT, 4, 0)),
    (ops.add_rms_norm, (X, X, normal(8), 1e-6)),
    (ops.add_rms_norm, (X.bfloat16(), X.bfloat16(), normal(8).bfloat16(), 1e-6, normal(8))),
    (ops.add_rms_norm_quantize_static, (X, X, normal(8), 1e-6, torch.tensor([0.1]), torch.tensor([3.0]))),
    (ops.add_rms_norm_quantize_per_token, (X.half(), X.half(), normal(8).half(), 1e-6)),
    (ops.swiglu_quantize_per_token, (X.half(), X.half())),
    (ops.write_latents, (normal(4, 2, 6), normal(2, 3, 6), torch.tensor([[0, -1], [5, 6]], dtype=torch.int32))),
    (ops.gather_latents, (normal(4, 2, 6), PAGES)),
    (ops.latent_attention, (normal(2, 3, 10), normal(10, 4), normal(4, 2, 6), PAGES, LENGTHS, 2, 2, 0.5)),
    (ops.grouped_dequantize, (torch.ones(5, 4).int(), normal(5, 1), normal(3, 4, 1), COUNTS)),
]


@pytest.mark.parametrize(("operator", "arguments"), CASES, ids=[str(case[0]) for case in CASES])
def test_shape_rule_gives_what_the_reference_computes(operator: Callable, arguments: tuple) -> None:
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_every_operator_has_a_case() -> None:
    assert {operator for operator, _ in CASES} == set(ops.REFERENCES)


WRONG = [
    (ops.embedding, (X, IDS.int()), "fxq::embedding: ids must be int64, not torch.int32"),
    (ops.linear, (X, normal(5, 8).half()), "fxq::linear: x is torch.float32, weight is torch.float16"),
    (ops.linear, (X, normal(5, 9)), "fxq::linear: x has 8 features, weight 9"),
    (ops.rms_norm, (X, normal(9), 1e-6), "fxq::rms_norm: x has 8 features, weight 9"),
    (ops.swiglu, (X, X[..., :4]), "fxq::swiglu: gate"),
    (ops.rope, (X, *TABLE, 3), "fxq::rope: 8 features do not split into 3 heads"),
    (ops.rope, (X, *TABLE, 4), "narrower than the table"),
    (ops.mla_attention, (X, normal(2, 4, 14), normal(2, 4, 1), IDS[..., 0], 2, 3, 0.5), "fxq::mla_attention: queries"),
    (ops.attend_halves, (X, *normal(2, 2, 1, 4, 4), normal(12, 5), IDS[..., 0], 2, 3, 0.5), "2 heads of 3 and 3"),
    (ops.attend_halves, (X, *normal(2, 2, 2, 4, 3), normal(12, 5), IDS[..., 0], 2, 3, 0.5), "not halves"),
    (ops.expand_heads, (normal(2, 4, 13), normal(2, 4, 1), 2, 3), "fxq::expand_heads: 13 features are not 2 heads"),
    (ops.attend_heads, (X, normal(2, 2, 4, 5), normal(2, 2, 4, 3), IDS[..., 0], 0.5), "not 2 heads of 5"),
    (ops.router_logits, (X, normal(4, 9)), "fxq::router_logits: x has 8 features, not 9"),
    (ops.moe_gate, (X.half(), normal(8), 3, 4, 2, True, 1.0), "logits must be float32, not torch.float16"),
    (ops.moe_gate, (X, normal(8), 3, 3, 2, True, 1.0), "8 experts, 3 groups"),
    (ops.moe_experts, (X, IDS, normal(2, 3, 2), normal(4, 6, 9), normal(4, 6, 9), normal(4, 9, 6)), "not 9"),
    (ops.moe_experts, (X, IDS, normal(2, 3, 2), normal(4, 6, 8), normal(4, 5, 8), normal(4, 8, 6)), "differ in shape"),
    (ops.quantize_static, (X, torch.ones(8), torch.ones(1)), "one scale and one offset"),
    (ops.int_matmul, (X, integers(-1, 1, 5, 8)), "fxq::int_matmul: x must be int8, not torch.float32"),
    (ops.int_matmul, (X8, normal(5, 8)), "fxq::int_matmul: weight must be int8, not torch.float32"),
    (ops.int4_matmul, (X8, integers(-1, 1, 5, 9)), "fxq::int4_matmul: x has 8 features, the weight 9"),
    (ops.dequantize_static, (X8.int(), normal(8), normal(8)), "quant_bias must be int32, not torch.float32"),
    (ops.dequantize_per_token, (X8.int(), normal(2, 3, 1), normal(9, 1)), "one weight_scale per output feature"),
    (ops.grouped_int_matmul, (ROWS8.int(), integers(-1, 1, 3, 5, 8), COUNTS), "fxq::grouped_int_matmul: x must be"),
]


@pytest.mark.parametrize(("operator", "arguments", "message"), WRONG, ids=[f"{c[0]}-{c[2][-12:]}" for c in WRONG])
def test_shape_rule_refuses(operator: Callable, arguments: tuple, message: str) -> None:
    on_meta = [value.to("meta") if isinstance(value, Tensor) else value for value in arguments]
    with pytest.raises(RuntimeError, match=message):
        operator(*on_meta)


def test_embedding_takes_rows() -> None:
    weight, ids = normal(5, 3), torch.tensor([[4, 0], [0, 2]])
    assert ops.embedding(weight, ids).tolist() == [[weight[i].tolist() for i in row] for row in ids.tolist()]


def test_linear_against_float64() -> None:
    x, weight, bias = normal(2, 3, 64), normal(5, 64, seed=1), normal(5, seed=2)
    exact = x.double() @ weight.double().T + bias.double()
    # k products and the bias, each rounded, summed in any order (Higham 2002, section 3.1)
    bound = 65 * U * (x.abs() @ weight.abs().T + bias.abs())
    assert ((ops.linear(x, weight, bias) - exact).abs() <= bound).all()


def test_rms_norm_against_loops() -> None:
    x, weight, bias = normal(4, 64) * 30, normal(64, seed=1), normal(64, seed=2)
    result = ops.rms_norm(x, weight, 1e-2, bias)
    for row, values in enumerate(x.double().tolist()):
        scale = 1 / math.sqrt(sum(value * value for value in values) / len(values) + 1e-2)
        for column, value in enumerate(values):
            product = value * scale * float(weight[column])
            # 64 squares summed in float32 are off by 64 U, the root halves it; a few roundings follow
            bound = (32 + 8) * U * (abs(product) + abs(float(bias[column])))
            assert abs(float(result[row, column]) - product - float(bias[column])) <= bound


def test_rms_norm_rounds_to_the_model_dtype_before_the_weight() -> None:
    x, weight = normal(16, 64).bfloat16(), normal(64, seed=1).bfloat16()
    wide = x.double()
    normed = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).to(torch.bfloat16)
    difference = (ops.rms_norm(x, weight, 1e-6).double() - (normed * weight).double()).abs()
    # the float32 norm falls to the other side of a bfloat16 tie in one of 2**16 / 40 values: 1024 values, at most a few
    assert (difference != 0).sum() <= 4


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(ops.rms_norm(torch.zeros(1, 8), torch.ones(8), 1e-6), torch.zeros(1, 8))


def test_swiglu_against_loops() -> None:
    gate, up = normal(50) * 10, normal(50, seed=1)
    for result, g, u in zip(ops.swiglu(gate, up).tolist(), gate.tolist(), up.tolist(), strict=True):
        exact = g / (1 + math.exp(-g)) * u
        # exp within two steps, then a sum, a quotient and two products, each half a step
        assert abs(result - exact) <= 8 * U * abs(exact)


def test_rope_table_against_loops() -> None:
    positions, frequencies = torch.tensor([[0, 1, 163839], [5, 77, 4096]]), [1.0, 0.1, 1e-4]
    cos, sin = ops.rope_table(positions, frequencies, 1.25)
    assert cos.shape == sin.shape == (2, 3, 6)
    for batch, row in enumerate(positions.tolist()):
        for index, position in enumerate(row):
            for column in range(6):
                frequency = torch.tensor(frequencies[column % 3])
                angle = float(position * frequency)  # the float32 product, as documented
                # cos and sin within two steps of a value up to one, then times 1.25
                assert abs(float(cos[batch, index, column]) - 1.25 * math.cos(angle)) <= 6 * U
                assert abs(float(sin[batch, index, column]) - 1.25 * math.sin(angle)) <= 6 * U


def test_rope_turns_interleaved_pairs_and_leaves_the_rest() -> None:
    x, heads, width = normal(2, 3, 2 * 10), 2, 4
    angles = normal(2, 3, width // 2, seed=1)
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    result = ops.rope(x, cos, sin, heads).unflatten(-1, (heads, -1))
    before = x.unflatten(-1, (heads, -1))
    assert torch.equal(result[..., :-width], before[..., :-width])
    for batch, position, head, pair in torch.cartesian_prod(*map(torch.arange, (2, 3, heads, width // 2))).tolist():
        real, imaginary = before[batch, position, head, 6 + 2 * pair : 8 + 2 * pair].tolist()
        rotated = complex(real, imaginary) * complex(cos[batch, position, pair], sin[batch, position, pair])
        halves = result[batch, position, head, 6:]
        # two products and their sum, each rounded: at most 2 U of the magnitudes, which are at most |pair|
        bound = 4 * U * abs(complex(real, imaginary))
        assert abs(complex(halves[pair], halves[pair + width // 2]) - rotated) <= bound


@pytest.mark.parametrize("queries", [4, 1])
def test_mla_attention_against_loops(queries: int) -> None:
    heads, nope, rope, value_width, total = 2, 3, 2, 5, 4
    q, k_rope = normal(2, queries, heads * (nope + rope)), normal(2, total, rope, seed=2)
    kv = normal(2, total, heads * (nope + value_width), seed=1)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    result = ops.mla_attention(q, kv, k_rope, mask, heads, value_width, 0.4).unflatten(-1, (heads, value_width))
    q, kv = q.double().unflatten(-1, (heads, -1)), kv.double().unflatten(-1, (heads, -1))
    for batch, query, head in torch.cartesian_prod(
        torch.arange(2), torch.arange(queries), torch.arange(heads)
    ).tolist():
        seen = [j for j in range(total) if j <= total - queries + query and mask[batch, j]]
        keys = [torch.cat((kv[batch, j, head, :nope], k_rope[batch, j].double())) for j in seen or range(total)]
        scores = [0.4 * float(q[batch, query, head] @ key) if seen else 0.0 for key in keys]
        weights = torch.tensor([math.exp(score) for score in scores], dtype=torch.float64)
        values = kv[batch, seen or list(range(total)), head, nope:]
        exact = (weights / weights.sum()) @ values
        # a score is off by at most 6 U of its terms' magnitudes, its exponential by as much relatively, and the
        # weighted mean by twice that and a rounding a step, of the largest value
        magnitude = max(0.4 * float(q[batch, query, head].abs() @ key.abs()) for key in keys)
        bound = 2 * (6 * magnitude + total + 8) * U * values.abs().max()
        assert (result[batch, query, head] - exact).abs().max() <= bound


def test_router_logits_are_float32_whatever_the_model() -> None:
    x, weight = normal(5, 64).bfloat16(), normal(7, 64, seed=1).bfloat16()
    exact = x.double() @ weight.double().T
    # 64 float32 products of exactly represented bfloat16 values; bfloat16 arithmetic would be off by 2**-9
    assert ((ops.router_logits(x, weight) - exact).abs() <= 64 * U * (x.double().abs() @ weight.double().abs().T)).all()
