"""Edges of whole ONNX models: experts with no token, one and all of them; no rows, no new tokens."""

import onnxruntime
import pytest
import torch
from onnx_calls import UNIT
from onnx_graphs import SUMS, Emitted, emit, node_values, quantized
from safetensors.torch import load_file, save_file
from tiny import write_checkpoint

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.program.operands import item_of, operand_node
from fxquant.program.program import Program
from fxquant.runtime.execute import execute, prefill_inputs

POLICIES = ["float", "deepseek_w4a8", "deepseek_w8a8"]
FAVOURITE = 5
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def favouring(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint whose router gives every token to one expert, among others."""
    folder = write_checkpoint(tmp_path_factory.mktemp("favouring"))
    tensors = load_file(folder / "model.safetensors")
    tensors[BIAS][FAVOURITE] = 8
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.fixture(scope="module", params=POLICIES)
def program(request: pytest.FixtureRequest, favouring: Checkpoint) -> Program:
    return quantized(favouring, request.param)


@pytest.fixture(scope="module", params=OnnxProfile)
def emitted(
    request: pytest.FixtureRequest, program: Program, favouring: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Emitted:
    return emit(program, favouring, tmp_path_factory.mktemp("onnx"), SUMS[request.param])


def tokens_of_experts(emitted: Emitted, ids: torch.Tensor) -> list[int]:
    """How many tokens each expert of the one layer with experts has."""
    values = node_values(emitted, prefill_inputs(emitted.program, ids))
    counts = next(
        (node for node in values if item_of(node)[1] == 2 and item_of(node)[0].target == ops.moe_init_routing), None
    )
    if counts is not None:
        return values[counts].tolist()
    whole = ops.moe_experts, ops.block_experts
    (ids_node,) = (operand_node(node, "ids") for node in values if node.target in whole)
    return values[ids_node].flatten().bincount(minlength=8).tolist()


@pytest.mark.parametrize("length", [1, 7])
def test_experts_with_no_token_with_one_and_with_all(emitted: Emitted, length: int) -> None:
    ids = torch.randint(0, 128, (1, length), generator=torch.Generator().manual_seed(1))
    counts = tokens_of_experts(emitted, ids)
    assert {0, 1, length} <= set(counts) and counts[FAVOURITE] == length
    inputs = prefill_inputs(emitted.program, ids)
    expected = execute(emitted.program, emitted.read, [inputs])[0][0]
    logits, _ = emitted.runner(*inputs[:3], inputs[3:])
    # sums of up to 256 hidden features; seeds are fixed, and no activation lies on a rounding boundary here
    assert (logits - expected).abs().max() <= 256 * UNIT * expected.abs().max()


@pytest.mark.parametrize(("rows", "new", "past"), [(0, 4, 0), (0, 1, 3), (1, 0, 0), (2, 0, 3), (0, 0, 0)])
def test_no_rows_or_no_new_tokens_give_empty_logits(emitted: Emitted, rows: int, new: int, past: int) -> None:
    """By onnxruntime alone: it runs a call of no tokens, which changes no cache."""
    session = onnxruntime.InferenceSession(emitted.folder / "model.onnx")
    tokens, total = torch.zeros(rows, new, dtype=torch.int64), torch.ones(rows, past + new, dtype=torch.int64)
    feeds = {"input_ids": tokens, "attention_mask": total, "position_ids": tokens}
    caches = [input_ for input_ in session.get_inputs() if input_.name not in feeds]
    for cache in caches:
        feeds[cache.name] = torch.randn(rows, past, cache.shape[2])
    logits, *presents = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    assert logits.shape == (rows, new, 128)
    for cache, present in zip(caches, presents, strict=True):
        assert present.shape == (rows, past + new, cache.shape[2])
        assert (present[:, :past] == feeds[cache.name].numpy()).all()
