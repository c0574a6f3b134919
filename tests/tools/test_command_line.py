"""The commands themselves: help, completion, what they are given by mistake, what they print and where."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import Fxquant
from test_tables import compile_report_of, evaluation, verification
from typer.testing import CliRunner

import fxquant
from fxquant.engines.table import Target
from fxquant.evaluation.divergence import evaluate_programs
from fxquant.policy.policy import shipped_policies
from fxquant.progress import silent, within
from fxquant.tools.main import app

VERBS = ("compile", "plan", "verify", "run", "bench", "eval", "compare", "show", "convert", "targets")


# help


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_values_not_types_of_python(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    types = set(re.findall(r"<(\w[\w ]*)>", result.output)) - {"path", "name", "policy", "target", "OUT"}
    assert types == set() and "list[" not in result.output and "bool" not in result.output


def test_flags_look_like_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = CliRunner().invoke(app, ["compile", "--help"]).output
    assert re.search(r"--force +Replace", text) and re.search(r"--json +Print", text) and re.search(r"-h +Show", text)
    assert re.search(r"--policy +-p +POLICY +Shipped", text) and re.search(r"--out +-o +FOLDER", text)


def test_help_tells_the_exit_codes() -> None:
    text = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert "Exit codes: 0 done; 1 wrong input" in text and "143 SIGTERM" in text


FAST = """
import sys
sys.argv = {arguments!r}
from fxquant.__main__ import run
try:
    run()
finally:
    print([name for name in ("torch", "numba", "onnx", "onnxruntime") if name in sys.modules], file=sys.stderr)
"""


def started(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own; the last line of stderr names the slow packages that were imported."""
    code = FAST.format(arguments=["fxquant", *arguments])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def completed(words: str) -> list[str]:
    """What bash offers after these words."""
    count = str(len(words.split(" ")) - 1)
    done = started([], _FXQUANT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "[]", done.stderr
    return done.stdout.split()


def test_completion_without_torch() -> None:
    assert completed("fxquant compile model -p ") == shipped_policies()
    assert completed("fxquant compile model --target vllm") == ["vllm-ascend"]


@pytest.mark.slow
def test_completion_of_everything_else() -> None:
    assert set(completed("fxquant ")) == set(VERBS)
    assert completed("fxquant compile ./mod") == [], "the shell completes paths"
    assert completed("fxquant compile m --policy ./mine") == []
    assert completed("fxquant convert out -t ") == [target.value for target in Target]
    assert completed("fxquant compile m --mtp ") == ["none", "float", "quant"]
    assert completed("fxquant compile m --device c") == ["cpu", "cuda"]
    assert "--restart" in completed("fxquant compile m --res")


def test_version_and_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fxquant", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{fxquant.__version__}\n", "")
    done = started(["--help"])
    assert done.returncode == 0 and "Usage: fxquant" in done.stdout and done.stderr.splitlines()[-1] == "[]"


# quiet, progress


def test_a_quiet_compile_says_nothing(fxquant_: Fxquant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = compile_report_of(tmp_path)
    monkeypatch.setattr("fxquant.api.compile", lambda *arguments: report)
    assert fxquant_("compile", "model", "--quiet") == (0, "", "")
    code, out, _ = fxquant_("compile", "model")
    assert code == 0 and str(tmp_path) in out
    monkeypatch.setattr("fxquant.tools.compile_report.as_document", lambda report: {"out": str(report.out)})
    code, out, text = fxquant_("compile", "model", "--quiet", "--json")
    assert (code, json.loads(out), text) == (0, {"out": str(tmp_path)}, "")


def test_a_quiet_convert_says_nothing(fxquant_: Fxquant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = compile_report_of(tmp_path, policy="p")
    monkeypatch.setattr("fxquant.api.convert", lambda *arguments: report)
    assert fxquant_("convert", "out", "-t", "mindie", "-q") == (0, "", "")
    code, out, _ = fxquant_("convert", "out", "-t", "mindie")
    assert code == 0 and str(tmp_path) in out.splitlines() and f"made {tmp_path.parent}" in out.splitlines()


def test_what_was_asked_for_is_printed_when_quiet(fxquant_: Fxquant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.api.verify", lambda *arguments: verification())
    code, out, text = fxquant_("verify", "out", "-q")
    assert code == 1 and text == "" and "FAILED" in out and "✗ vllm-ascend-per-group: activations == graph: x" in out
    monkeypatch.setattr("fxquant.api.evaluate", lambda *arguments: evaluation())
    code, out, text = fxquant_("eval", "out", "--text", "t", "-q")
    assert code == 0 and text == "" and "quantized" in out


def test_what_verify_has_not_looked_at_is_named(fxquant_: Fxquant, monkeypatch: pytest.MonkeyPatch) -> None:
    report = verification()
    report.unread = {"a\x1b.pt2": "all of it"}
    monkeypatch.setattr("fxquant.api.verify", lambda *arguments: report)
    assert "not looked at: a\\x1b.pt2: all of it" in fxquant_("verify", "out")[1]


def test_stages_name_what_they_work_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Bar:
        def __enter__(self) -> Callable[..., None]:
            return lambda amount, at="": seen.append((amount, at))

        def __exit__(self, *error: object) -> None: ...

    def report(stage: str, total: int, unit: str) -> Bar:
        seen.append((stage, total, unit))
        return Bar()

    monkeypatch.setattr("fxquant.evaluation.divergence.logits", lambda *arguments: [])
    monkeypatch.setattr("fxquant.evaluation.divergence.document_scores", lambda *arguments: [])
    monkeypatch.setattr("fxquant.evaluation.divergence.summary", lambda *arguments: None)
    programs: list[Any] = [SimpleNamespace(), None]
    evaluate_programs((None, None), [programs, programs], [None] * 3, within("t", report), ["a", "b"])  # type: ignore
    assert seen[:3] == [("t: evaluate", 6, "batches"), (3, "a"), (3, "b")]
    with within("x", silent)("stage", 1, "unit") as advance:
        advance(1, at="there")


def test_the_table_of_targets_says_what_it_does(fxquant_: Fxquant, tiny_folder: Callable[..., Path]) -> None:
    arguments = ("targets", tiny_folder(), "--table", "-p", "float", "-t", "onnx", "--tp", "1")
    code, out, text = fxquant_(*arguments)
    assert code == 0 and "trace: 1 graph" in text and "check: 1 policies on targets" in text and "float" in out
    assert fxquant_(*arguments, "--json")[2] == ""


# any locale

IN_TURN = """
import sys
from fxquant.__main__ import run
folder, other = sys.argv[1:]
for verb, *options in (["plan", "-p", "float", "--disk", "3"], ["show"]):
    codes = []
    for path in (folder, other):
        sys.argv = ["fxquant", verb, path, *options]
        try:
            run()
        except SystemExit as ended:
            codes.append(ended.code)
    print(codes)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, encoding",
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "ascii"),
        ({"PYTHONIOENCODING": "ascii"}, "ascii"),
        ({"PYTHONIOENCODING": "latin-1"}, "latin-1"),
    ],
    ids=["C", "ascii", "latin-1"],
)
def test_in_any_locale(
    environment: dict[str, str], encoding: str, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    """A table, lines with signs of ours, and an error of each, all about a folder whose name is no ASCII."""
    folder = tmp_path / "modèle"
    folder.mkdir()
    for file in tiny_folder().iterdir():
        (folder / file.name).symlink_to(file)
    command = [sys.executable, "-c", IN_TURN, str(folder), str(folder / "→")]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, **environment})
    out, told = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == 0 and "Traceback" not in told, told
    planned, shown, end = out.split("[0, 1]\n")
    assert "routed_expert" in planned and "-- " in shown and not end
    assert told.count("no such file or folder.") == 2
