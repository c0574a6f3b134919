"""PrefillPerToken: mixed linears become those that a dynamic policy makes, and all others stay."""

from pathlib import Path

import pytest
import torch
from ascend_folders import rewritten
from paged import copy
from torch import Tensor

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.lowering.ascend.deployment import deployment
from fxquant.passes.npu.prefill_per_token import PrefillPerToken
from fxquant.program.program import Program
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.runtime.weight_providers import RecipeWeights

RULES = 'rules: [{{kind: attention, path: "*.kv_b_proj", scheme: FLOAT}}, {{kind: attention, scheme: {}}}]'
STATIC = (ops.quantize_static, ops.dequantize_static, ops.add_rms_norm_quantize_static)


def under(checkpoint: Checkpoint, folder: Path, scheme: str) -> Program:
    """Attention in `scheme`, the rest per token."""
    policy = folder / f"{scheme}.yaml"
    policy.write_text(f"extends: deepseek_w8a8\n{RULES.format(scheme)}\n")
    return rewritten(checkpoint, str(policy))


def logits(program: Program, checkpoint: Checkpoint) -> Tensor:
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(1))
    return execute(program, RecipeWeights(program, checkpoint), [prefill_inputs(program, ids)])[0][0]


@pytest.mark.parametrize("fused", [False, True])
def test_mixed_linears_are_those_of_a_dynamic_policy(checkpoint: Checkpoint, tmp_path: Path, fused: bool) -> None:
    """Both have the same integers and scales, so that the logits are equal bit for bit."""
    mixed, dynamic = (under(checkpoint, tmp_path, scheme) for scheme in ("W8A8_MIX", "W8A8_DYNAMIC"))
    program = deployment(mixed).program if fused else copy(mixed)
    result = PrefillPerToken()(program)
    assert len(result.rewritten) == 8 and result.skipped == {}
    assert [program.nodes(target) for target in STATIC] == [[], [], []]
    assert not any(target.endswith(("deq_scale", "input_scale", "quant_bias")) for target in program.parameters)
    assert torch.equal(logits(program, checkpoint), logits(dynamic, checkpoint))
    assert not torch.equal(logits(mixed, checkpoint), logits(dynamic, checkpoint))


def test_static_linears_stay(checkpoint: Checkpoint, tmp_path: Path) -> None:
    program = under(checkpoint, tmp_path, "W8A8")
    before = len(program.nodes(ops.dequantize_static))
    result = PrefillPerToken()(program)
    assert result.rewritten == () and set(result.skipped.values()) == {"its scheme is W8A8"}
    assert len(program.nodes(ops.dequantize_static)) == len(result.skipped) == before
