"""Generated text: batches of unequal prompts are single runs, by ONNX Runtime and by the fx graph; ends and limits."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from talking import BOS, CONTEXT, ascend_out, onnx_out, out, talking
from torch import Tensor

import fxquant
from fxquant.api import open_generator, open_output
from fxquant.errors import FxquantError
from fxquant.generation.batch import Batch
from fxquant.generation.completion import Completion, Piece, Totals
from fxquant.generation.generator import TextGenerator
from fxquant.generation.options import GenerateOptions
from fxquant.generation.prompts import Prompt
from fxquant.generation.runner import Runner
from fxquant.runtime.execute import execute, prefill_inputs

__all__ = ["ascend_out", "onnx_out", "out", "talking"]
PROMPTS = ["a", "hello", "BcDdxyz" * 4, "abcabc", "q" * 11]
NEW = 10


def completions(out: Path, prompts: Sequence[Any], **options: Any) -> list[Completion]:
    """Of prompts that run together."""
    return completed(open_generator(out, GenerateOptions(**{"max_new_tokens": NEW, **options})), prompts)


def completed(generator: TextGenerator, prompts: Sequence[Any]) -> list[Completion]:
    """In the order of the prompts; each text is that of its pieces."""
    encoded = generator.encode([Prompt(f"prompt {index}", prompt) for index, prompt in enumerate(prompts)])
    texts, done, totals = [""] * len(prompts), dict[int, Completion](), []
    for event in generator.write(encoded):
        if isinstance(event, Piece):
            assert event.index not in done
            texts[event.index] += event.text
        elif isinstance(event, Totals):
            totals.append(event)
        else:
            done[event.index] = event
    assert [done[index].text for index in range(len(prompts))] == texts
    assert [each.new_tokens for each in totals] == [sum(len(each.token_ids) for each in done.values())]
    return [done[index] for index in range(len(prompts))]


def told(done: Completion) -> tuple[Any, ...]:
    return done.text, done.token_ids, done.finish_reason, done.stop_word, done.prompt_tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_a_batch_is_single_runs(out: Path, options: dict[str, Any]) -> None:
    generator = open_generator(out, GenerateOptions(max_new_tokens=NEW, batch_size=3, **options))
    alone = [told(completed(generator, [prompt])[0]) for prompt in PROMPTS]
    assert [told(each) for each in completed(generator, PROMPTS)] == alone
    assert len({text for text, *_ in alone}) == len(PROMPTS)


def test_the_best_tokens_are_those_of_the_graph(out: Path) -> None:
    (done,) = completions(out, ["hello"])
    program, read = open_output(out)
    ids = open_generator(out).encode([Prompt("p", "hello")])[0].ids
    assert ids[0] == BOS and len(ids) == 6
    tokens = list(ids)
    for _ in range(NEW):  # without a cache
        logits = execute(program, read, [prefill_inputs(program, torch.tensor([tokens]))])[0][0]
        tokens.append(int(logits[0, -1].argmax()))
    assert done.token_ids == tokens[len(ids) :] and done.finish_reason == "length"
    assert "".join(fxquant.run(out, "hello", NEW)) == done.text


class Counting:
    """A runner that counts the rows and the cached tokens of its calls."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self.past_axes = runner, runner.past_axes
        self.calls: list[tuple[int, int, int]] = []

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor, past: list[Tensor]) -> Any:
        assert all(
            cache.shape[axis] == mask.shape[1] - ids.shape[1] for cache, axis in zip(past, self.past_axes, strict=True)
        )
        self.calls.append((*ids.shape, mask.shape[1]))
        return self._runner(ids, mask, positions, past)

    def empty_cache(self, batch: int) -> list[Tensor]:
        return self._runner.empty_cache(batch)


def test_finished_rows_leave_the_batch_with_their_padding(onnx_out: Path) -> None:
    generator = open_generator(onnx_out, GenerateOptions(max_new_tokens=20))
    counting = Counting(generator.runner)
    generator.runner = counting  # type: ignore[misc]
    long, short = "a" * 40, "bc"
    encoded = generator.encode([Prompt("long", long), Prompt("short", short)])
    generator.context = 46  # of which the long prompt leaves five tokens
    done = {event.index: event for event in generator.write(encoded) if isinstance(event, Completion)}
    assert [len(done[index].token_ids) for index in (0, 1)] == [5, 20]
    assert counting.calls[:6] == [(2, 41, 41), (2, 1, 42), (2, 1, 43), (2, 1, 44), (2, 1, 45), (1, 1, 8)]
    assert len(counting.calls) == 20
    assert done[1].token_ids == completions(onnx_out, [short], max_new_tokens=20)[0].token_ids


def test_a_prompt_in_chunks_is_the_whole(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = completions(out, PROMPTS)
    monkeypatch.setattr("fxquant.generation.batch.LOGIT_BYTES", 0)
    monkeypatch.setattr("fxquant.generation.batch.SHORTEST_CHUNK", 4)
    assert [told(each) for each in completions(out, PROMPTS)] == [told(each) for each in whole]


def test_caches_are_kept_row_by_row(onnx_out: Path) -> None:
    """A step after others left gives the logits of a batch that never had them."""
    rows = [[5, 6], [7, 8, 9], [10] * 6]
    runner = open_generator(onnx_out).runner
    batch, alone = Batch(runner, rows, 128), Batch(runner, rows[1:2], 128)
    batch.prefill(), alone.prefill()
    batch.keep([1])
    with torch.inference_mode():
        assert torch.equal(batch.step([11]), alone.step([11]))


# ends


def test_end_tokens_are_those_of_the_generation_config(onnx_out: Path, tmp_path: Path) -> None:
    (plain,) = completions(onnx_out, ["hello"])
    out = Path(shutil.copytree(onnx_out, tmp_path / "out"))
    end = plain.token_ids[4]
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [end], "max_new_tokens": 6}))
    (done,) = completions(out, ["hello"], max_new_tokens=None)
    first = plain.token_ids.index(end)
    assert done.token_ids == plain.token_ids[: first + 1] and done.finish_reason == "stop"
    (ignored,) = completions(out, ["hello"], generation_config=False)
    assert told(ignored) == told(plain)


def test_limits_of_the_generation_config(onnx_out: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(onnx_out, tmp_path / "out"))
    for document, count in (({"max_new_tokens": 3}, 3), ({"max_length": 10}, 4), ({}, CONTEXT - 6)):
        (out / "generation_config.json").write_text(json.dumps(document))
        (done,) = completions(out, ["hello"], max_new_tokens=None)
        assert (len(done.token_ids), done.finish_reason) == (count, "length")


def test_stop_words_end_a_text_before_them(onnx_out: Path) -> None:
    (plain,) = completions(onnx_out, ["hello"])
    stop = plain.text[3:6]
    done, other = completions(onnx_out, ["hello", "q"], stop=[stop, "§"])
    assert (done.text, done.finish_reason, done.stop_word) == (plain.text[: plain.text.index(stop)], "stop_word", stop)
    assert done.token_ids == plain.token_ids[: len(done.token_ids)] and other.finish_reason in ("length", "stop_word")


def test_a_text_ends_at_the_context(onnx_out: Path) -> None:
    (done,) = completions(onnx_out, ["a" * 60], max_new_tokens=50)
    assert (done.prompt_tokens, len(done.token_ids), done.finish_reason) == (61, 3, "length")


# prompts


def test_chats_take_the_template_and_one_bos(onnx_out: Path) -> None:
    def ids(prompt: Any, **options: Any) -> list[int]:
        generator = open_generator(onnx_out, GenerateOptions(**options))
        return generator.encode([Prompt("p", prompt)])[0].ids

    user, assistant, system, a, b = 2, 3, 4, 5, 6
    assert ids("a") == [BOS, a] == ids([BOS, a]) and ids("") == [BOS]
    assert ids("a", chat=True) == [BOS, user, a, assistant]
    assert ids("a", chat=True, system="b") == [BOS, system, b, user, a, assistant]


def test_prompts_that_cannot_be_continued(onnx_out: Path) -> None:
    generator = open_generator(onnx_out)
    with pytest.raises(FxquantError, match=r"p: 65 tokens, but the model has 64 positions\. Pass at most 63"):
        generator.encode([Prompt("p", "a" * 64)])
    with pytest.raises(FxquantError, match="token ids 5 … 128, but the vocabulary has 128"):
        generator.encode([Prompt("p", [5, 128])])
    with pytest.raises(FxquantError, match="is half a character"):
        fxquant.run(onnx_out, "a \udcff")


def test_a_chat_without_a_template(onnx_out: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(onnx_out, tmp_path / "out"))
    (out / "tokenizer_config.json").write_text("{}")
    with pytest.raises(FxquantError, match="has no chat template"):
        open_generator(out, GenerateOptions(chat=True)).encode([Prompt("p", "a")])
