"""Decoding of whole ONNX models: steps, chunks and batches give the logits of one run over the whole text.

float32 sums of up to 256 hidden features, and attention in either order of its products, differ by the roundings of
their terms; seeds are fixed, and no activation lies on a rounding boundary here.
"""

import pytest
import torch
from greedy_texts import best_tokens
from onnx_calls import UNIT
from onnx_graphs import SUMS, Emitted, emit, quantized
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.generation import batch
from fxquant.generation.batch import Batch
from fxquant.generation.greedy import greedy
from fxquant.lowering.onnx.runner import OnnxRunner
from fxquant.program.program import Program
from fxquant.runtime.program_runner import ProgramRunner

VOCABULARY, STEPS = 128, 6
PROMPTS = [[5, 17, 3, 99, 42, 11, 64, 7, 80], [23], [90, 1, 55, 8]]
ROUNDINGS = 256 * UNIT


@pytest.fixture(scope="module", params=["float", "deepseek_w4a8", "deepseek_w8a8"])
def program(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Program:
    return quantized(checkpoint, request.param)


@pytest.fixture(scope="module", params=OnnxProfile)
def emitted(
    request: pytest.FixtureRequest, program: Program, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Emitted:
    return emit(program, checkpoint, tmp_path_factory.mktemp("onnx"), SUMS[request.param])


def whole(runner: OnnxRunner, ids: list[int]) -> Tensor:
    """[length, vocabulary], in one run without a cache."""
    return runner.prefill(torch.tensor([ids]))[0][0]


def assert_near(mine: Tensor, other: Tensor) -> None:
    assert mine.shape == other.shape and (mine - other).abs().max() <= ROUNDINGS * other.abs().max()


def test_a_step_gives_the_logits_of_the_whole_text(emitted: Emitted) -> None:
    (prompt, *_), runner = PROMPTS, emitted.runner
    steps = list(greedy(runner, [prompt], STEPS, VOCABULARY))
    text = prompt + best_tokens(steps)[0]
    assert len(steps) == STEPS
    for length, logits in enumerate(steps, len(prompt)):
        assert_near(logits[0], whole(runner, text[:length])[-1])


def test_rows_of_unequal_lengths_are_single_runs(emitted: Emitted) -> None:
    together = list(greedy(emitted.runner, PROMPTS, STEPS, VOCABULARY))
    for row, prompt in enumerate(PROMPTS):
        alone = list(greedy(emitted.runner, [prompt], STEPS, VOCABULARY))
        assert best_tokens(alone) == [best_tokens(together)[row]]
        for mine, other in zip(together, alone, strict=True):
            assert_near(mine[row], other[0])


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_prompt_in_chunks_is_the_whole(emitted: Emitted, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk of a row may be padding alone."""
    at_once = Batch(emitted.runner, PROMPTS, VOCABULARY).prefill()
    monkeypatch.setattr(batch, "LOGIT_BYTES", 0)
    monkeypatch.setattr(batch, "SHORTEST_CHUNK", chunk)
    assert_near(Batch(emitted.runner, PROMPTS, VOCABULARY).prefill(), at_once)


def test_texts_are_those_of_the_rewritten_graph(emitted: Emitted) -> None:
    runners = emitted.runner, ProgramRunner(emitted.program, emitted.read)
    mine, reference = (list(greedy(runner, PROMPTS, STEPS, VOCABULARY)) for runner in runners)
    assert best_tokens(mine) == best_tokens(reference)
    for logits, expected in zip(mine, reference, strict=True):
        assert_near(logits, expected)
