"""fxq:: operators on latents in pages, and the passes that put them into a graph."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ascend_folders import rewritten
from paged import CALLS, LateNorm, PagedRun, absorbed, copy, empty_pages, forward_logits, paged, tokens
from rewrites import ULP
from slowness import others_slow
from tiny import float_program
from torch import Tensor

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.lowering.ascend.emitted.cache import Cache
from fxquant.models import DecoderLayer
from fxquant.passes.npu.absorb_latents import AbsorbLatents
from fxquant.passes.npu.page_latents import CACHE_INPUTS, PageLatents
from fxquant.runtime.weight_providers import Cached, RecipeWeights

HEADS, NOPE, ROPE, VALUE, RANK = 3, 4, 2, 5, 6
LENS = (5, 1, 7)
SCALE = 0.4


def floats(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Three sequences over pages of 4, each of which owns three; S is 1."""
    q, weight = floats(3, 1, HEADS * (NOPE + ROPE), seed=0), floats(HEADS * (NOPE + VALUE), RANK, seed=1)
    cache, table = floats(10, 4, RANK + ROPE, seed=2), torch.tensor([[7, 2, 9], [1, 0, 0], [3, 8, 4]]).int()
    return q, weight, cache, table, torch.tensor(LENS, dtype=torch.int32)


def slow_attention(q: Tensor, weight: Tensor, cache: Tensor, table: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, head by head, with keys and values formed; and the bound of a float32 result.

    A score sums over nope, rank and rope: its rounding is at most that many units of what its terms' magnitudes add up
    to, which shifts a probability by twice as much. The context sums over positions, rank and one more product.
    """
    q, weight, cache = q.double(), weight.double(), cache.double()
    out = torch.zeros(len(q), 1, HEADS * VALUE, dtype=torch.float64)
    bound = torch.zeros_like(out)
    for row, head in itertools.product(range(len(q)), range(HEADS)):
        latents = torch.stack([cache[table[row, j // 4], j % 4] for j in range(int(lens[row]))])
        own = weight[head * (NOPE + VALUE) : (head + 1) * (NOPE + VALUE)]
        query = q[row, 0, head * (NOPE + ROPE) : (head + 1) * (NOPE + ROPE)]
        keys = torch.cat((latents[:, :RANK] @ own[:NOPE].T, latents[:, RANK:]), 1)
        values = latents[:, :RANK] @ own[NOPE:].T
        weights = (keys @ query * SCALE).softmax(0)
        out[row, 0, head * VALUE : (head + 1) * VALUE] = weights @ values
        reach = torch.cat((latents[:, :RANK].abs() @ own[:NOPE].abs().T, latents[:, RANK:].abs()), 1) @ query.abs()
        error = 2 * (NOPE + RANK + ROPE + 2) * SCALE * reach.max() + 2 * len(latents) + RANK + 16
        magnitude = weights @ (latents[:, :RANK].abs() @ own[NOPE:].abs().T)
        bound[row, 0, head * VALUE : (head + 1) * VALUE] = error * ULP * magnitude
    return out, bound


def test_absorbed_attention_is_that_over_keys_and_values() -> None:
    q, weight, cache, table, lens = attention_inputs()
    expected, bound = slow_attention(q, weight, cache, table, lens)
    result = ops.latent_attention(q, weight, cache, table, lens, HEADS, VALUE, SCALE)
    assert ((result - expected).abs() <= bound).all()
    nothing = ops.latent_attention(q, weight, cache, table, torch.zeros_like(lens), HEADS, VALUE, SCALE)
    assert torch.equal(nothing, torch.zeros_like(result))


def test_several_queries_see_what_is_before_them() -> None:
    _, weight, cache, table, lens = attention_inputs()
    q = floats(3, 3, HEADS * (NOPE + ROPE), seed=4)
    together = ops.latent_attention(q, weight, cache, table, lens, HEADS, VALUE, SCALE)
    for step in range(3):
        alone = ops.latent_attention(q[:, step : step + 1], weight, cache, table, lens - 2 + step, HEADS, VALUE, SCALE)
        _, bound = slow_attention(q[:, step : step + 1], weight, cache, table, (lens - 2 + step).clamp(min=1))
        assert ((together[:, step : step + 1] - alone).abs() <= 2 * bound).all()


def test_latents_are_written_and_gathered_by_slot() -> None:
    cache, latents = torch.zeros(3, 2, 4), floats(2, 5, 4, seed=0)
    slots = torch.tensor([[5, -1], [0, 3]], dtype=torch.int32)
    written = ops.write_latents(cache, latents, slots)
    expected = torch.zeros(6, 4)
    expected[5], expected[0], expected[3] = latents[0, 3], latents[1, 3], latents[1, 4]
    assert torch.equal(written, expected.view(3, 2, 4))
    assert not cache.any()
    gathered = ops.gather_latents(written, torch.tensor([[2, 0], [1, 1]], dtype=torch.int32))
    assert torch.equal(gathered, torch.stack((written[[2, 0]].flatten(0, 1), written[[1, 1]].flatten(0, 1))))
    assert ops.gather_latents(written, torch.zeros(2, 0, dtype=torch.int32)).shape == (2, 0, 4)


def test_shape_rules() -> None:
    q, weight, cache, table, lens = (tensor.to("meta") for tensor in attention_inputs())
    assert ops.latent_attention(q, weight, cache, table, lens, HEADS, VALUE, SCALE).shape == (3, 1, HEADS * VALUE)
    with pytest.raises(RuntimeError, match=re.escape("queries of 18 are not 3 heads of 3 and 2")):
        ops.latent_attention(q, weight, cache, table, lens, HEADS, VALUE + 1, SCALE)
    with pytest.raises(RuntimeError, match="latents of 4, not of the cache"):
        ops.write_latents(torch.empty(3, 2, 5, device="meta"), torch.empty(2, 5, 4, device="meta"), table)


# passes


def test_decode_reads_the_cache_and_makes_no_keys(checkpoint: Checkpoint) -> None:
    graph = absorbed(float_program(checkpoint))
    placeholders = [node.name for node in graph.graph.graph.find_nodes(op="placeholder")]
    assert placeholders == ["input_ids", "attention_mask", "position_ids", "past_0", "past_1", *CACHE_INPUTS]
    gone = (ops.mla_attention, ops.gather_latents)
    assert [len(graph.nodes(target)) for target in (*gone, ops.latent_attention, ops.write_latents)] == [0, 0, 2, 2]
    assert not any("kv_b_proj" in str(node.target) for node in graph.graph.graph.nodes if node.op == "call_function")
    assert "model.layers.0.self_attn.kv_b_proj.weight" in graph.parameters
    assert [node.target for node in graph.graph.graph.output_node().args[0][1:]] == [ops.write_latents] * 2


def test_what_cannot_be_absorbed_says_why(checkpoint: Checkpoint) -> None:
    program = rewritten(checkpoint, "float", LateNorm)
    _, (result,) = paged(program, AbsorbLatents())
    assert result.rewritten == ()
    assert set(result.skipped.values()) == {"its keys are not the two parts of one latent"}


def test_quantized_keys_stay(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("extends: deepseek_w8a8\nrules: [{kind: attention, scheme: W8A8_DYNAMIC}]\n")
    _, (result,) = paged(rewritten(checkpoint, str(tmp_path / "p.yaml")), AbsorbLatents())
    assert "layers_0_self_attn_kv_b_proj, which is not a float linear" in str(result.skipped)


def test_a_cache_that_nothing_is_appended_to_stays(checkpoint: Checkpoint) -> None:
    program = copy(float_program(checkpoint))
    output, (first, second) = program.graph.graph.output_node(), program.graph.graph.find_nodes(op="placeholder")[3:]
    logits, _, present = output.args[0]  # type: ignore[misc]
    output.args = ((logits, first, present),)
    PageLatents()(program)
    assert output.args[0][1] is first and len(program.nodes(ops.write_latents)) == 1  # type: ignore[index]
    exchanged = copy(float_program(checkpoint))
    output, (first, second) = (
        exchanged.graph.graph.output_node(),
        exchanged.graph.graph.find_nodes(op="placeholder")[3:],
    )
    output.args = ((output.args[0][0], second, first),)  # type: ignore[index]
    with pytest.raises(FxquantError, match="past_0: is returned as past_1"):
        PageLatents()(exchanged)


# numbers


@pytest.mark.parametrize("kind", ["paged", "contiguous"])
@pytest.mark.parametrize("layer", others_slow([DecoderLayer, LateNorm], [DecoderLayer]))
@pytest.mark.parametrize("policy", ["float", "deepseek_w4a8"])
def test_steps_over_pages_give_the_logits_of_a_whole_forward(
    checkpoint: Checkpoint, policy: str, layer: type[DecoderLayer], kind: str
) -> None:
    """Sums of up to 64 terms in another order (rank, positions) in each of two layers, as in `test_ascend.py`."""
    program = rewritten(checkpoint, policy, layer)
    prefill, decode = paged(program)[0], absorbed(program)
    make: Callable[..., Cache] = Cache.paged if kind == "paged" else Cache.contiguous
    run = PagedRun(Cached(RecipeWeights(program, checkpoint)), make(empty_pages(15, 4), 3), [[], [], []])
    for number, counts in enumerate(CALLS):
        new = tokens(counts, number)
        results = run.prefill(prefill, new) if number < 2 else run.decode(decode, new)
        for sequence, own, logits in zip(run.sequences, new, results, strict=True):
            if own:
                expected = forward_logits(program, run.read, sequence)[-len(own) :]
                assert (logits - expected).abs().max() <= 2 * 64 * ULP * expected.abs().max()
