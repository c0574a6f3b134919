"""fxquant run and fxquant bench: what is on stdout and on stderr, JSON, files of prompts, and interrupts."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Fxquant
from talking import ascend_out, onnx_out, out, talking

import fxquant
from fxquant.errors import FxquantError
from fxquant.generation.completion import Completion, Piece
from fxquant.generation.generator import TextGenerator
from fxquant.generation.prompts import Encoded
from fxquant.tools.bench import benchmark_table
from fxquant.tools.console import console
from fxquant.verbs import bench as verb
from fxquant.verbs.bench import Benchmark

__all__ = ["ascend_out", "onnx_out", "out", "talking"]
MOST = ("--max-new-tokens", "6")
KEYS = (
    "index place prompt prompt_tokens text token_ids finish_reason stop_word prefill_seconds decode_seconds "
    "load_seconds tokens_per_second peak_bytes sampling"
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("hello\na\n\nabcabcabc\n")
    return file


def test_text_is_on_stdout_and_rates_are_on_stderr(fxquant_: Fxquant, out: Path) -> None:
    code, text, told = fxquant_("run", out, "--prompt", "hello", *MOST)
    assert code == 0 and text == f"hello{''.join(fxquant.run(out, 'hello', 6))}\n"
    prompt, new, machine = told.splitlines()
    assert prompt.startswith("6 prompt tokens in ") and new.startswith("6 new tokens in ") and new.endswith(", greedy")
    assert machine.startswith("loaded in ") and ", peak memory " in machine


def test_a_file_of_prompts_in_text_and_in_json(fxquant_: Fxquant, onnx_out: Path, prompts: Path) -> None:
    places = [f"{prompts}:{line}" for line in (1, 2, 4)]
    sampled = ("--temperature", "0.9", "--top-k", "9", "--seed", "5", "--batch-size", "2")
    code, text, told = fxquant_("run", onnx_out, "--prompts", prompts, *MOST, *sampled)
    assert code == 0 and [line for line in text.splitlines() if line.startswith("── ")] == [f"── {p}" for p in places]
    assert "generate: 18 tokens" in told and "18 new tokens" in told and "temperature 0.9, top_k 9, seed 5" in told
    code, lines, told = fxquant_("run", onnx_out, "--prompts", prompts, *MOST, *sampled, "--json", "--quiet")
    done = [json.loads(line) for line in lines.splitlines()]
    assert (code, told) == (0, "") and [each["place"] for each in done] == places
    assert text == "".join(f"── {each['place']}\n{each['prompt']}{each['text']}\n" for each in done)
    assert [" ".join(each) for each in done] == [KEYS] * 3
    assert {each["finish_reason"] for each in done} == {"length"} and len(done[0]["token_ids"]) == 6
    assert done[0]["sampling"] == {"greedy": False, "temperature": 0.9, "top_k": 9, "seed": 5}


def test_a_chat_prints_the_answer_alone(fxquant_: Fxquant, onnx_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    code, line, told = fxquant_(
        "run", onnx_out, "--prompt", "-", "--chat", "--system", "b", *MOST, "--json", "--stop", "zz", "-q"
    )
    done = json.loads(line)
    assert (code, told) == (0, "") and (done["place"], done["prompt"], done["prompt_tokens"]) == ("stdin", "", 10)
    code, text, _ = fxquant_("run", onnx_out, "--prompt", "hello", "--chat", "--system", "b", *MOST, "-q")
    assert (code, text) == (0, done["text"] + "\n")


def test_unknown_keys_of_the_generation_config_are_named(fxquant_: Fxquant, onnx_out: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnx_out, tmp_path / "out"))
    (folder / "generation_config.json").write_text('{"chat_format": "x", "do_sample": true, "temperature": 0.5}')
    code, _, told = fxquant_("run", folder, "--prompt", "a", *MOST)
    said = " ".join(told.split())  # lines are wrapped
    assert code == 0 and said.startswith(f"{folder}/generation_config.json: nothing is known of chat_format: not used")
    assert "temperature 0.5, seed 0" in said
    (folder / "generation_config.json").write_text('{"num_beams": 2}')
    code, text, told = fxquant_("run", folder, "--prompt", "a", *MOST)
    assert (code, text) == (1, "") and "num_beams" in told
    assert fxquant_("run", folder, "--prompt", "a", "--no-generation-config", *MOST, "-q")[0] == 0


def test_prepacked_weights_give_the_same_text(fxquant_: Fxquant, onnx_out: Path, tmp_path: Path) -> None:
    packed = ("--prepack", tmp_path / "packed")
    _, expected, _ = fxquant_("run", onnx_out, "--prompt", "hello", *MOST, "-q")
    for _ in range(2):
        assert fxquant_("run", onnx_out, "--prompt", "hello", *MOST, "-q", *packed)[:2] == (0, expected)
    code, text, _ = fxquant_("bench", onnx_out, "--steps", "2", "--repeats", "1", "--json", *packed)
    assert code == 0 and json.loads(text)["out"]["runs"] == "onnxruntime"
    assert len(list((tmp_path / "packed").iterdir())) == 1


def test_an_fx_graph_has_nothing_to_prepack(fxquant_: Fxquant, ascend_out: Path, tmp_path: Path) -> None:
    code, text, told = fxquant_("run", ascend_out, "--prompt", "a", *MOST, "--prepack", tmp_path / "packed")
    assert (code, text) == (1, "") and "has no ONNX graph" in told


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "there is no prompt"),
        (("--prompt", "a", "--prompts", "b.txt"), "both are given"),
        (("--prompt", "a", "--system", "b"), "Add --chat"),
        (("--prompt", "a", "--greedy", "--top-p", "0.5"), "contradicts --top-p"),
        (("--prompts", "none.txt"), "no such file"),
    ],
)
def test_wrong_arguments(fxquant_: Fxquant, onnx_out: Path, arguments: tuple[str, ...], words: str) -> None:
    code, text, told = fxquant_("run", onnx_out, *arguments)
    assert (code, text) == (1, "") and words in told


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_an_interrupt_leaves_what_was_written_on_a_line(
    fxquant_: Fxquant, onnx_out: Path, quiet: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: TextGenerator, *arguments: Any) -> Iterator[Piece]:
        yield Piece(0, "xyz")
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "write", interrupted)
    assert fxquant_("run", onnx_out, "--prompt", "ab", *quiet) == (130, "abxyz\n", "interrupted.\n")


@pytest.mark.parametrize("as_json", [True, False])
def test_an_interrupt_loses_no_complete_text(
    fxquant_: Fxquant, onnx_out: Path, prompts: Path, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second prompt of three was complete before the first."""
    whole = TextGenerator.write

    def interrupted(self: TextGenerator, encoded: list[Encoded], *more: Any) -> Iterator[Completion]:
        yield from (event for event in whole(self, encoded[:2]) if isinstance(event, Completion) and event.index == 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "write", interrupted)
    options = ("--json", "--quiet") if as_json else ("--quiet",)
    code, text, told = fxquant_("run", onnx_out, "--prompts", prompts, *MOST, *options)
    assert (code, told) == (130, "interrupted.\n")
    place = json.loads(text)["place"] if as_json else text.split("\n")[0].removeprefix("── ")
    assert place == f"{prompts}:2"


# bench


def test_what_is_measured(out: Path) -> None:
    plan = verb._plan(out, 2, 1)
    figures = dict(verb.measure(out, plan, verb.Session(1)))
    assert list(figures) == ["load_seconds", "decode batch 1", "decode batch 8", "peak_bytes", "graph_bytes"]
    assert all(value > 0 for value in figures.values()) and (plan.past, plan.prompts) == (62, [])


def test_a_context_without_room(fxquant_: Fxquant, onnx_out: Path) -> None:
    code, text, told = fxquant_("bench", onnx_out, "--steps", "64")
    assert (code, text) == (1, "") and "context of 64 tokens is too short" in told


def test_an_error_of_the_measuring_process_is_that_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb._main(tmp_path, verb.Session(), 2, 1)
    name, error = json.loads(capsys.readouterr().out)
    assert name == "error" and "not an output of fxquant" in FxquantError(*error).fact


@pytest.mark.slow
def test_bench_beside_the_float_graph(fxquant_: Fxquant, out: Path, talking: Path) -> None:
    options = ("--steps", "2", "--repeats", "1")
    code, text, told = fxquant_("bench", out, "--against", talking, *options, "--json")
    results = json.loads(text)
    assert (code, told, list(results)) == (0, "", ["out", "float"])
    for result in results.values():
        assert list(result["rates"]) == ["decode batch 1", "decode batch 8"] and result["peak_bytes"] > 10**7
        assert result["runs"] == ("onnxruntime" if out.name == "onnx" else "fx graph")


def test_the_table_has_both_graphs_and_their_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    mine = Benchmark("onnxruntime", {"prefill 128": 1234.5, "decode batch 1": 20.0}, 128, 32, 1.5, 10**9, 10**8)
    other = Benchmark("onnxruntime", {"prefill 128": 617.25}, 128, 32, 3.0, 4 * 10**9, 10**9)
    console.print(benchmark_table(Path("out/x"), {"out": mine, "float": other}))
    lines = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in capsys.readouterr().out.splitlines() if line[0] in "│┃"]
    assert lines == [
        ["", "OUT", "float", "ratio"],
        ["prefill 128, tokens/s", "1,234", "617", "2.00"],
        ["decode batch 1, tokens/s", "20", "", ""],
        ["load", "1.5 s", "3.0 s", "0.50"],
        ["peak memory", "1 GB", "4 GB", "0.25"],
        ["of it by the graph", "100 MB", "1 GB", "0.10"],
    ]


@pytest.mark.slow
def test_a_measuring_process_that_dies_is_an_error(
    fxquant_: Fxquant, onnx_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb.sys, "executable", "/bin/false")  # type: ignore[attr-defined]
    code, _, told = fxquant_("bench", onnx_out, "--steps", "2")
    assert code == 1 and "the process that measures it ended with 1" in told
