"""prefill and decode of the emitted module: numbers, text of the trained example, and the cache's bookkeeping."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ascend_folders import Compile, Compiled, compile_folder, compiled_folders, function_text
from greedy_texts import GreedyTexts
from hypothesis import given
from hypothesis import strategies as st
from paged import CALLS, LateNorm, rows, tokens
from places import EXAMPLE
from rewrites import ULP
from torch import Tensor

from fxquant.lowering.ascend.emitted.cache import Cache
from fxquant.models import DecoderLayer
from fxquant.text.tokenizer import open_tokenizer

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def compiled(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Compile:
    return compiled_folders(tiny_folder, tmp_path_factory)


def float32_model(output: Compiled) -> Any:
    return output.module().names["Model"].load(output.folder, torch.float32)


def caches(model: Any, sequences: int, length: int) -> list[Any]:
    """Pages that sequences share, crossed by block boundaries of 4; and runs of one page a sequence."""
    blocks = sequences * -(-length // 4)
    return [model.paged_cache(sequences, blocks, 4), model.contiguous_cache(sequences, length, length)]


def whole(model: Any, sequence: list[int]) -> Tensor:
    """Logits [length, vocabulary] of the module's own forward."""
    ids = torch.tensor([sequence])
    return model(ids, torch.ones_like(ids), torch.arange(len(sequence))[None], model.empty_past(1))[0][0]


MODELS = [("float", DecoderLayer), ("deepseek_w8a8", DecoderLayer), ("deepseek_w4a8", DecoderLayer)]


@pytest.mark.parametrize(("policy", "layer"), [*MODELS, ("deepseek_w8a8", LateNorm)])
def test_steps_give_the_logits_of_forward(compiled: Compile, policy: str, layer: type[DecoderLayer]) -> None:
    """float32 sums of up to 64 terms (rank, positions) in another order, in each of two layers.

    A layer of the last model cannot be absorbed: its decoding gathers what prefill gathers.
    """
    output = compiled(policy, layer)
    assert ("npu_scatter_pa_kv_cache" in output.code) and ("latent_attention(" in output.code) == (
        layer is DecoderLayer
    )
    model = float32_model(output)
    for cache in caches(model, 3, 20):
        sequences: list[list[int]] = [[], [], []]
        for number, counts in enumerate(CALLS):
            new = tokens(counts, number)
            run = model.prefill if number < 2 else model.decode
            logits = run(*rows(new, cache.lengths), cache)
            for sequence, own, step_logits in zip(sequences, new, logits, strict=True):
                sequence.extend(own)
                if own:
                    expected = whole(model, sequence)[-len(own) :]
                    assert (step_logits[: len(own)] - expected).abs().max() <= 2 * 64 * ULP * expected.abs().max()
        assert cache.lengths == [len(sequence) for sequence in sequences]


@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_golden_text(compiled: Compile, graph: str) -> None:
    text = function_text(compiled("deepseek_w4a8").code, f"dense_block_{graph}")
    assert text == (GOLDEN / f"ascend_dense_block_{graph}.txt").read_text()


def test_prefill_and_decode_write_the_same_latents(compiled: Compile) -> None:
    """A token's latent is made of its own row, but for what attention below it gave: the first layer's are equal."""
    model = float32_model(compiled("deepseek_w4a8"))
    first, second = (model.paged_cache(1, 4, 4) for _ in range(2))
    (text,) = tokens([9], 1)
    model.prefill(*rows([text], [0]), first)
    for token in text:
        model.decode(*rows([[token]], second.lengths), second)
    for page, other_page in zip(first.pages[0], second.pages[0], strict=True):
        assert (page - other_page).abs().max() <= 64 * ULP * page.abs().max()


def test_mixed_linears_are_per_token_in_prefill_and_static_in_decode(compiled: Compile) -> None:
    output = compiled("deepseek_w8a8_mix")
    code, model = output.code, float32_model(output)
    prefill, decode = (function_text(code, f"dense_block_{graph}") for graph in ("prefill", "decode"))
    assert "deq_scale" not in prefill and prefill.count("self_attn.o_proj.weight_scale") == 1
    assert "self_attn.o_proj.weight_scale" not in decode and decode.count("self_attn.o_proj.deq_scale") == 1
    cache = model.paged_cache(3, 12, 4)
    new = tokens([5, 3, 7], 0)
    logits = model.prefill(*rows(new, cache.lengths), cache)
    static = [whole(model, own)[-1] for own in new]
    differ = [
        float((row[len(own) - 1] - other).abs().max()) for row, own, other in zip(logits, new, static, strict=True)
    ]
    assert min(differ) > 1e-3  # another quantization of the same activations


def test_decode_takes_one_token(compiled: Compile) -> None:
    model = float32_model(compiled("float"))
    with pytest.raises(ValueError, match="decode takes one token per sequence, not 2"):
        model.decode(torch.zeros(1, 2, dtype=torch.int64), torch.arange(2)[None], model.paged_cache(1, 4, 4))


# bookkeeping


def pages(blocks: int, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(blocks, size, 1, 2), torch.zeros(blocks, size, 1, 1))]


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3).filter(any), max_size=6), st.integers(1, 4), st.booleans())
def test_every_position_has_a_slot_of_its_own(calls: list[tuple[int, ...]], size: int, paged: bool) -> None:
    cache = (Cache.paged if paged else Cache.contiguous)(pages(3 * -(-30 // size), size), 3)
    owner: dict[int, tuple[int, int]] = {}
    for counts in calls:
        before = list(cache.lengths)
        _, positions = rows([[0] * count for count in counts], before)
        step = cache.decode_step(positions)
        for row, column in itertools.product(range(3), range(positions.shape[1])):
            slot, position = int(step.slot_mapping[row, column]), int(positions[row, column])
            assert (slot < 0) == (position < 0)
            if slot >= 0:
                assert int(step.block_table[row, position // size]) == slot // size
                assert owner.setdefault(slot, (row, position)) == (row, position)
                assert slot % size == position % size
        held = step.attention_mask.sum(1).tolist()
        assert held == step.seq_lens == [length + count for length, count in zip(before, counts, strict=True)]
        cache.advance(step)


def test_released_pages_are_taken_again() -> None:
    cache = Cache.paged(pages(3, 4), 2)
    _, positions = rows([[0] * 9, []], cache.lengths)
    cache.advance(cache.prefill_step(positions))
    assert (cache.lengths, cache.free) == ([9, 0], [])
    with pytest.raises(ValueError, match="sequence 1 of 1 positions needs a page, but none is free"):
        cache.decode_step(rows([[], [0]], cache.lengths)[1])
    cache.release(0)
    cache.advance(cache.decode_step(rows([[], [0]], cache.lengths)[1]))
    assert (cache.lengths, len(cache.free)) == ([0, 1], 2)


@pytest.mark.parametrize("positions", [[[0, 1]], [[0]] * 3, [[2], [0]], [[1], [-1]], [[-1, 0], [0, 1]]])
def test_positions_go_on_from_what_a_sequence_holds(positions: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="position_ids do not continue from"):
        Cache.paged(pages(8, 4), 2).prefill_step(torch.tensor(positions))


# the trained example

STEPS, PROMPTS = 24, (5, 16, 33)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_folder(EXAMPLE, tmp_path_factory.mktemp("example"), "deepseek_w4a8")


def prompts() -> list[list[int]]:
    tokenizer = open_tokenizer(EXAMPLE)
    lines = (EXAMPLE / "evaluation.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[: len(PROMPTS)]]
    ids = [tokenizer.encode(text) for text in texts]
    return [[0, *own[: length - 1]] for own, length in zip(ids, PROMPTS, strict=True)]


def greedy(model: Any, cache: Any, sequences: list[list[int]]) -> list[list[int]]:
    """What `decode` writes after prompts of different lengths, all in one batch; each is prefilled in two pieces."""
    half = [own[: len(own) // 2] for own in sequences]
    model.prefill(*rows(half, cache.lengths), cache)
    rest = [own[len(own) // 2 :] for own in sequences]
    logits = model.prefill(*rows(rest, cache.lengths), cache)
    last = [int(row[len(own) - 1].argmax()) for row, own in zip(logits, rest, strict=True)]
    written = [[token] for token in last]
    for _ in range(STEPS - 1):
        logits = model.decode(*rows([[token] for token in last], cache.lengths), cache)
        last = logits[:, 0].argmax(-1).tolist()
        for own, token in zip(written, last, strict=True):
            own.append(token)
    return written


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1], ids=["paged", "contiguous"])
def test_the_example_writes_the_same_text(example: Compiled, kind: int) -> None:
    model = float32_model(example)
    expected = GreedyTexts(example.program, example.read(), prompts(), STEPS)
    for difference in expected.differences(greedy(model, caches(model, len(PROMPTS), 64)[kind], prompts())):
        assert difference.margin <= expected.noise(difference)
