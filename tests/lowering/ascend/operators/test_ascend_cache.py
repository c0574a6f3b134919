"""torch.ops.npu on CPU: attention over pages, writing into them; and the shape rules of all operators."""

import re
from typing import Any

import pytest
import torch
from ascend_calls import UNIT, floats, int8, low_words, npu, pack_int4
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fxquant.lowering.ascend.operators import KERNELS, SHAPES

RANK, ROPE, SIZE = 6, 2, 4
LENS = [5, 0, 12]
TABLE = torch.tensor([[3, 1, 0], [0, 0, 0], [4, 5, 2]], dtype=torch.int32)


def paged_inputs() -> dict[str, Any]:
    """Three sequences, two heads; the value is the key."""
    key = floats(6, 1, SIZE, RANK, seed=1)
    tensors = {"query": floats(3, 2, 1, RANK), "key": key, "value": key, "block_table": TABLE}
    tensors |= {"query_rope": floats(3, 2, 1, ROPE, seed=2), "key_rope": floats(6, 1, SIZE, ROPE, seed=3)}
    numbers = {"num_heads": 2, "num_key_value_heads": 1, "scale": 0.4, "block_size": SIZE}
    return tensors | numbers | {"input_layout": "BNSD", "actual_seq_lengths_kv": LENS}


def test_paged_attention_is_that_over_the_positions_of_each_sequence() -> None:
    """Both sum the same terms, in orders that differ: twice the bound of `test_ascend_attention.attention_bound`."""
    call = paged_inputs()
    result, lse = npu.npu_fused_infer_attention_score(**call)
    assert lse.tolist() == [0.0]
    assert not result[1].any()
    for row in (0, 2):
        pages = {
            name: call[name][TABLE[row].long()].flatten(0, 2)[: LENS[row]].repeat(1, 2).view(1, LENS[row], 2, -1)
            for name in ("key", "value", "key_rope")
        }
        queries = {name: call[name][row : row + 1].transpose(1, 2) for name in ("query", "query_rope")}
        expected, _ = npu.npu_fused_infer_attention_score(
            **queries, **pages, num_heads=2, scale=0.4, input_layout="BSND"
        )
        longest = {name: float(tensor.norm(dim=-1).max()) for name, tensor in {**queries, **pages}.items()}
        reach = 0.4 * (longest["query"] * longest["key"] + longest["query_rope"] * longest["key_rope"])
        bound = 2 * (2 * (RANK + ROPE + 2) * reach + 2 * LENS[row] + 16) * UNIT
        assert ((result[row, :, 0] - expected[0, 0]).abs() <= bound * pages["value"].abs().max()).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_layout": "BSND"}, "block_table needs input_layout 'BNSD'"),
        ({"num_key_value_heads": 2}, "num_heads and num_key_value_heads are not 2 and 1"),
        (
            {"query_rope": None, "key_rope": None},
            "block_table needs query_rope, key_rope and actual_seq_lengths_kv",
        ),
        ({"actual_seq_lengths_kv": None}, "block_table needs query_rope, key_rope and actual_seq_lengths_kv"),
        ({"actual_seq_lengths_kv": [5, 0, 13]}, "actual_seq_lengths_kv is not within 12"),
        ({"actual_seq_lengths_kv": [5]}, "block_table or actual_seq_lengths_kv has other rows"),
        ({"block_size": 2}, "key is (6, 1, 4, 6), not (6, 1, 2, 6)"),
        ({"block_table": None}, "input_layout 'BNSD' is not supported"),
        ({"query": floats(3, 2, 2, RANK)}, "query has 2 steps"),
    ],
)
def test_paged_attention_names_what_it_does_not_take(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"npu_fused_infer_attention_score: {message}")):
        npu.npu_fused_infer_attention_score(**paged_inputs() | arguments)


def scatter_inputs() -> dict[str, Any]:
    caches = {"key_cache": torch.zeros(2, 4, 1, 3), "value_cache": torch.zeros(2, 4, 1, 2)}
    slots = torch.tensor([6, -1, 0], dtype=torch.int32)
    new = {"key": floats(3, 1, 3), "value": floats(3, 1, 2, seed=1)}
    return {**new, **caches, "slot_mapping": slots, "cache_mode": "Norm"}


def test_scatter_writes_rows_into_their_slots() -> None:
    call = scatter_inputs()
    assert npu.npu_scatter_pa_kv_cache(**call) is None
    for name in ("key", "value"):
        expected = torch.zeros_like(call[f"{name}_cache"])
        expected[1, 2], expected[0, 0] = call[name][0], call[name][2]
        assert torch.equal(call[f"{name}_cache"], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_mode": "PA_NZ"}, "cache_mode 'PA_NZ' is not supported"),
        ({"key": floats(3, 1, 4)}, "key (3, 1, 4) does not fit key_cache (2, 4, 1, 3)"),
        ({"value": floats(3, 1, 2).half()}, "value is torch.float16, value_cache is torch.float32"),
        ({"slot_mapping": torch.tensor([0, 1, 8])}, "slot_mapping is not within 8 slots"),
        ({"seq_lens": torch.ones(3)}, "seq_lens is not supported"),
    ],
)
def test_scatter_names_what_it_does_not_take(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"npu_scatter_pa_kv_cache: {message}")):
        npu.npu_scatter_pa_kv_cache(**scatter_inputs() | arguments)


X, COUNTS = floats(4, 16), torch.tensor([1, 3])
IDS = torch.tensor([[0, 2], [1, 2], [0, 1], [2, 0]], dtype=torch.int32)
GMM = {"group_list": COUNTS, "split_item": 2, "group_type": 0, "group_list_type": 1}
BF16 = {"output_dtype": torch.bfloat16}
A8W4 = {"bias": [floats(2, 8)], "scale": [low_words(floats(2, 1, 8))], "per_token_scale": [floats(4)]}
ROUTING = {"expert_num": 3, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
GATE = {"k_group": 1, "group_count": 2, "group_select_mode": 1, "norm_type": 1}
HALVES = {"query": floats(2, 3, 2, 4), "key": floats(2, 5, 2, 4), "value": floats(2, 5, 2, 6)}
CALLS: list[tuple[str, tuple, dict]] = [
    ("npu_dynamic_quant", (X.view(2, 2, 16),), {}),
    ("npu_quantize", (X, torch.ones(1), None, torch.qint8, -1, True), {}),
    ("npu_trans_quant_param", (torch.ones(3),), {}),
    ("npu_quant_matmul", (int8(2, 3, 4), int8(4, 5), torch.ones(5)), BF16),
    ("npu_grouped_matmul", ([X], [floats(2, 16, 5)]), GMM),
    ("npu_grouped_matmul", ([int8(4, 16)], [pack_int4(int8(2, 16, 8) >> 4)]), GMM | A8W4 | BF16),
    ("npu_rms_norm", (X, torch.ones(16)), {}),
    ("npu_add_rms_norm", (X, X, torch.ones(16)), {}),
    ("npu_add_rms_norm_quant", (X, X, torch.ones(16), torch.ones(16), torch.zeros(16)), {}),
    ("npu_add_rms_norm_dynamic_quant", (X, X, torch.ones(16)), {"output_mask": [True, False]}),
    ("npu_dequant_swiglu_quant", (X,), {"activate_left": True, "quant_mode": 1}),
    ("npu_swiglu", (X, 0), {}),
    ("npu_interleave_rope", (floats(2, 3, 5, 4), floats(2, 1, 5, 4), floats(2, 1, 5, 4)), {}),
    ("npu_fused_infer_attention_score", (), HALVES | {"num_heads": 2, "input_layout": "BSND"}),
    (
        "npu_fused_infer_attention_score",
        (),
        HALVES | {"num_heads": 2, "input_layout": "BSND", "softmax_lse_flag": True},
    ),
    ("npu_fused_infer_attention_score", (), paged_inputs()),
    ("npu_scatter_pa_kv_cache", (), scatter_inputs()),
    ("npu_moe_gating_top_k", (floats(3, 8), 2), GATE),
    ("npu_moe_gating_top_k", (floats(3, 8), 2), GATE | {"out_flag": True}),
    ("npu_moe_init_routing_v2", (X, IDS), ROUTING),
    ("npu_moe_init_routing_v2", (X, IDS), ROUTING | {"active_expert_range": [1, 3]}),
    ("npu_moe_token_unpermute", (floats(8, 16), torch.arange(8), floats(4, 2)), {}),
    ("npu_moe_token_unpermute", (floats(8, 16), torch.arange(8)), {}),
]


def test_every_operator_has_a_shape_rule_and_a_call_here() -> None:
    assert KERNELS.keys() == SHAPES.keys() == {name for name, _, _ in CALLS}


@pytest.mark.parametrize(("name", "args", "kwargs"), CALLS, ids=[name for name, _, _ in CALLS])
def test_shape_rules_give_what_kernels_give(name: str, args: tuple, kwargs: dict) -> None:
    result = getattr(npu, name)(*args, **kwargs)
    with FakeTensorMode() as mode:
        fake = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        expected = getattr(npu, name)(*fake[0], **fake[1])
    assert described(result) == described(expected)


def described(outputs: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: (tensor.dtype, tuple(tensor.shape), tensor.stride()), outputs)
