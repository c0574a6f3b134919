"""Whatever ends a command: one screen, its exit code, no traceback; and what is said is true."""

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from fxquant.errors import FxquantError, InternalError, StoppedError
from fxquant.tools.console import Terminal
from fxquant.tools.main import EXIT_CODES, run
from fxquant.tools.signals import Signals

Command = Callable[..., tuple[int, str]]


class PanicException(BaseException):
    """As pyo3 makes of a panic of Rust."""


class OutOfMemoryError(RuntimeError):
    """As torch's."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """`command("show", error)`: exit code and stderr of a verb that ends with that error."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def call(verb: str, error: BaseException) -> tuple[int, str]:
        functions = {
            "show": "open_graph",
            "compile": "compile",
            "run": "open_generator",
            "verify": "verify",
            "eval": "evaluate",
        }

        def end(*arguments: Any) -> None:
            raise error

        monkeypatch.setattr(f"fxquant.api.{functions[verb]}", end)
        more = {"run": ["--prompt", "x"], "eval": ["--text", "x"]}.get(verb, [])
        monkeypatch.setattr(sys, "argv", ["fxquant", verb, "model", *more])
        with pytest.raises(SystemExit) as stop:
            run()
        assert isinstance(stop.value.code, int)
        return stop.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    "error, words",
    [
        (FxquantError("a.json", "is wrong.", "Mend it."), ["error", "a.json", "is wrong.", "→ Mend it."]),
        (StoppedError("disk", "is full.", "Free it."), ["disk", "is full.", "→ Free it."]),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), ["/out/x", "No space left", "Free space"]),
        (PermissionError(errno.EACCES, "Permission denied", b"/a"), ["/a", "Permission denied", "its owner"]),
        (OSError(errno.EIO, "Input/output error"), ["a stream or a file", "Input/output error", "Check the disk"]),
        (FileExistsError(errno.EEXIST, "File exists", "/a", None, "/b"), ["/b", "File exists", "same command"]),
        (OSError("odd"), ["OSError: odd"]),
        (MemoryError(), ["memory", "--jobs, --batch-size"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), ["--seq-len"]),
        (RuntimeError("unable to mmap 8 bytes from file <a>: Cannot allocate memory (12)"), ["memory", "--seq-len"]),
        (OutOfMemoryError("CUDA out of memory"), ["--batch-size"]),
        (ImportError("libtorch.so: cannot open", name="torch._C"), ["the installation", "Reinstall fxquant"]),
    ],
)
def test_of_the_input_or_the_machine(command: Command, error: BaseException, words: list[str]) -> None:
    code, text = command("show", error)
    assert code == 1 and all(word in text for word in words), text
    assert "Traceback" not in text and "fault of fxquant" not in text and len(text.splitlines()) <= 24


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x\x1b[31m"),
        RecursionError("maximum recursion depth exceeded"),
        PanicException("called `Option::unwrap()` on a `None` value"),
        RuntimeError("line\nline"),
        InternalError("node add", "has no checked shape."),
        ImportError("no module", name="fxquant.passes"),
        UnicodeEncodeError("ascii", "→", 0, 1, "ordinal not in range"),
        GeneratorExit(),
        AssertionError("y" * 10**5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_of_ours(command: Command, error: BaseException, tmp_path: Path) -> None:
    code, text = command("show", error)
    assert code == 70 and "This is a fault of fxquant, not of your files." in text
    assert type(error).__name__ in text and "\x1b" not in text and "Traceback (" not in text
    (saved,) = tmp_path.glob("fxquant-fault-*.txt")
    assert str(saved) in text.splitlines() and saved.stat().st_mode & 0o077 == 0
    written = saved.read_text()
    assert "Traceback (most recent call last)" in written and "command: fxquant show model" in written
    assert re.search(r"fxquant \S+, Python 3\.\d+", written) and "torch 2." in written
    assert len(text.splitlines()) <= 24


def test_of_ours_with_no_place_to_save_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    code, text = command("show", KeyError("x"))
    assert code == 70 and "could not be saved" in text and "KeyError: 'x'" in text and "test_boundary.py" in text


def test_of_ours_with_the_state_of_the_output(command: Command) -> None:
    error = KeyError("x")
    error.state = "/out is as it was."  # type: ignore[attr-defined]
    assert "/out is as it was." in command("compile", error)[1].splitlines()


# Ctrl-C and SIGTERM


@pytest.mark.parametrize("verb", ["compile", "show", "run", "verify", "eval"])
def test_an_interrupt_promises_what_is_true(command: Command, verb: str) -> None:
    code, text = command(verb, KeyboardInterrupt())
    assert code == 130 and ("Nothing had been written" in text) is (verb == "compile")
    assert text.startswith("interrupted.") and text.count("\n") == 1


def test_what_the_work_says_of_its_state_is_passed_on(command: Command) -> None:
    stop = KeyboardInterrupt()
    stop.state = "The output is complete: out."  # type: ignore[attr-defined]
    assert command("compile", stop) == (130, "interrupted. The output is complete: out.\n")


@pytest.mark.parametrize(
    "number, code, word", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("becomes", [KeyboardInterrupt, ImportError, FxquantError])
def test_a_signal_is_told_whatever_it_becomes(
    number: int,
    code: int,
    word: str,
    becomes: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*arguments: Any) -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except KeyboardInterrupt as stop:
            raise becomes("numpy", "failed to import") from stop

    monkeypatch.setattr("fxquant.api.verify", work)
    monkeypatch.setattr(sys, "argv", ["fxquant", "verify", "out"])
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == code and capsys.readouterr().err.startswith(word)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class Dying:
    """Python drops what is raised while an object goes."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)


def test_an_interrupt_that_python_drops_comes_again(capfd: pytest.CaptureFixture[str]) -> None:
    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), Signals() as own:
        Dying()
        time.sleep(5)
    assert own.received == signal.SIGINT and sys.unraisablehook == hook and capfd.readouterr().err == ""


def test_ignored_signals_stay_ignored() -> None:
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


TWICE = """
import os, signal
from fxquant.tools.signals import Signals
with Signals({working}):
    try:
        os.kill(os.getpid(), signal.{first})
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    "working, first, code, word",
    [
        (True, "SIGINT", 130, "interrupted"),
        (True, "SIGTERM", 143, "interrupted"),
        (False, "SIGINT", 130, "interrupted"),
    ],
)
def test_a_second_one_and_an_early_one_end_the_process_at_once(working: bool, first: str, code: int, word: str) -> None:
    text = TWICE.format(working=working, first=first)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (code, "", word)


# pipes and usage


def test_a_closed_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def closed(*arguments: Any, **options: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("fxquant.tools.main.console.print", closed)
    monkeypatch.setattr(sys, "argv", ["fxquant", "--version"])
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 141 and capsys.readouterr().err == ""


def test_a_full_disk_behind_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fxquant", "--version"])
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:  # noqa: PTH123
        patch.setattr(sys, "stdout", full)
        patch.setattr("fxquant.tools.main.console", Terminal())  # one that keeps what it could not write
        with pytest.raises(SystemExit) as stop:
            run()
    text = capsys.readouterr().err
    assert stop.value.code == 1 and "No space left on device" in text and "Free space" in text


def test_what_was_typed_wrong_is_only_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["sh\x1b[31mow"], ["show", "model", "--bl\x1b[31mock"], ["show", "a", "b\x1b[31m"]):
        monkeypatch.setattr(sys, "argv", ["fxquant", *arguments])
        with pytest.raises(SystemExit) as stop:
            run()
        text = capsys.readouterr().err
        assert stop.value.code == 2 and "\x1b" not in text and "\\x1b[31m" in text


def test_every_exit_code_is_documented() -> None:
    document = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for code in ("0", "1", "2", "70", "130", "141", "143"):
        assert re.search(rf"^\| {code} \|", document, re.MULTILINE) and re.search(rf"\b{code}\b", EXIT_CODES)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0, 4.0])
def test_at_any_moment_of_a_command(number: int, code: int, seconds: float) -> None:
    """While torch is imported, while another process measures: one line, no traceback of either process."""
    model = ROOT / "fxquant" / "models" / "deepseek_v3_671b.json"
    text = "import fxquant.tools.signals; print('on', flush=True); from fxquant.__main__ import run; import sys; "
    text += f"sys.argv = ['fxquant', 'plan', {str(model)!r}]; run()"
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    time.sleep(seconds)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
    out, told = process.communicate(timeout=120)
    assert process.returncode == code and out == "" and "Traceback" not in told
    assert told.strip().rstrip(".") == ("interrupted" if number == signal.SIGINT else "terminated")
