"""The passes that give the ONNX graph other caches: in halves, and of all heads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ascend_folders import rewritten
from rewrites import insert_after
from torch import Tensor

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.errors import FxquantError
from fxquant.lowering.onnx.deployment import deployment
from fxquant.program.operands import operand_node
from fxquant.program.program import Program
from fxquant.runtime.execute import cache_inputs, execute, prefill_inputs
from fxquant.runtime.weight_providers import Cached, RecipeWeights

ATEN = torch.ops.aten
SPLIT, PRESENT = "layers_0_self_attn_split_with_sizes_2_0", "layers_0_self_attn_cat_1"
QUANTIZED = """
extends: float
rules:
  - {path: "*.kv_b_proj", scheme: W8A8_DYNAMIC, why: speed}
"""


def deployed(program: Program, cache: OnnxCache) -> Program:
    return deployment(program, OnnxForm(OnnxProfile.INTEGER, cache)).program


def outputs(program: Program, checkpoint: Checkpoint, inputs: list[Tensor]) -> list[Tensor]:
    return execute(program, Cached(RecipeWeights(program, checkpoint)), [inputs])[0]


def cached_inputs(program: Program) -> list[Tensor]:
    """Three rows of four new tokens after five, the second row left-padded by two."""
    seed = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, :2] = 0
    ids = torch.randint(100, (3, 4), generator=seed)
    caches = [torch.randn(3, 5, node.meta["val"].shape[-1], generator=seed) for node in cache_inputs(program)]
    return [ids, mask, (mask.cumsum(1) - 1).clamp(min=0)[:, 5:], *caches]


def halves(latents: Tensor) -> list[Tensor]:
    return [half.unsqueeze(1) for half in latents.chunk(2, -1)]


@pytest.fixture(params=["deepseek_w4a8", "quantized kv_b_proj"])
def program(checkpoint: Checkpoint, tmp_path: Path, request: pytest.FixtureRequest) -> Program:
    policy = request.param
    if policy not in ("deepseek_w4a8",):
        policy = str(tmp_path / "kv.yaml")
        (tmp_path / "kv.yaml").write_text(QUANTIZED)
    return rewritten(checkpoint, policy)


def test_halves_are_read_and_returned_where_latents_were(program: Program, checkpoint: Checkpoint) -> None:
    changed = deployed(program, OnnxCache.HALVES)
    assert [node.name for node in cache_inputs(changed)] == ["past_0_key", "past_0_value", "past_1_key", "past_1_value"]
    absorbs = any(node.target == ops.linear and "kv_b" in node.name for node in program.graph.graph.nodes)
    joined = [node for node in changed.graph.graph.nodes if node.name.endswith("_joined")]
    # where nothing but the attention reads latents, halves are nowhere joined
    assert len(changed.nodes(ops.attend_halves)) == (2 if absorbs else 0) and len(joined) == (0 if absorbs else 2)
    ids, mask, positions, *past = cached_inputs(program)
    logits, *latents = outputs(program, checkpoint, [ids, mask, positions, *past])
    found, *parts = outputs(
        changed, checkpoint, [ids, mask, positions, *(half for one in past for half in halves(one))]
    )
    assert torch.equal(found, logits)
    assert all(
        torch.equal(torch.cat(parts[2 * layer : 2 * layer + 2], -1)[:, 0], one) for layer, one in enumerate(latents)
    )


def test_all_heads_give_what_latents_give_and_new_tokens_alone_are_expanded(
    program: Program, checkpoint: Checkpoint
) -> None:
    changed = deployed(program, OnnxCache.EXPANDED)
    (heads, sequence) = (changed.nodes(ops.attend_heads), changed.graph.graph.find_nodes(op="placeholder")[0])
    assert len(heads) == 2 and not changed.nodes(ops.mla_attention)
    for node in changed.nodes(ops.expand_heads):
        assert operand_node(node, "kv").meta["val"].shape[1] == sequence.meta["val"].shape[1]
    ids, mask, positions, *_ = cached_inputs(program)
    before = prefill_inputs(program, ids)
    _, *past = outputs(program, checkpoint, before)
    _, *parts = outputs(changed, checkpoint, prefill_inputs(changed, ids))
    assert [part.shape for part in parts[:2]] == [(3, 4, 4, 24), (3, 4, 4, 16)]
    mask, positions = torch.ones(3, 8, dtype=torch.int64), torch.arange(4, 8).expand(3, 4)
    logits = outputs(program, checkpoint, [ids, mask, positions, *past])[0]
    found = outputs(changed, checkpoint, [ids, mask, positions, *parts])[0]
    # a score is one sum instead of two; in a quantized graph a last bit may flip a code: 1%
    assert (found - logits).norm() <= 0.01 * logits.norm()


def test_an_odd_latent_has_no_halves(tiny: Callable[..., Checkpoint]) -> None:
    program = rewritten(tiny(kv_lora_rank=31), "float")
    with pytest.raises(
        FxquantError, match="--onnx-cache halves: latents of layer 0 have 39 numbers, which have no halves"
    ):
        deployed(program, OnnxCache.HALVES)
    assert len(cache_inputs(deployed(program, OnnxCache.EXPANDED))) == 4


REFUSED: dict[str, tuple[OnnxCache, tuple[Any, ...], str]] = {
    "another cache": (
        OnnxCache.HALVES,
        (PRESENT, ATEN.mul.Tensor, 2.0),
        "layer 0 returns .* as its cache, which is not",
    ),
    "tokens mixed": (OnnxCache.EXPANDED, (SPLIT, ATEN.cumsum.default, 1), "layer 0: .* reads latents of all tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_do_otherwise_are_named(checkpoint: Checkpoint, case: str) -> None:
    cache, (name, target, *rest), fact = REFUSED[case]
    program = rewritten(checkpoint, "float")
    insert_after(program, name, target, *rest)
    with pytest.raises(FxquantError, match=f"--onnx-cache {cache}: {fact}"):
        deployed(program, cache)
    assert len(cache_inputs(deployed(program, OnnxCache.LATENT))) == 2
