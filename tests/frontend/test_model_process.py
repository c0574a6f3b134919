"""The process of a model.py: it may end, print, fork and start others, and nothing of it stays."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import FxquantError
from fxquant.frontend import child, child_main
from fxquant.frontend.source import open_source
from fxquant.frontend.traced import Traced
from fxquant.inputs.limits import ANSWER_BYTES
from fxquant.processes.command import Ended

pytestmark = pytest.mark.usefixtures("own_process")

PLAIN = """
from fxquant.models import DeepseekV3

def build_model(config):
    return DeepseekV3(config)
"""
OWN_SESSION = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open({note!r}, "w").write(str(os.getpid()))
        time.sleep(1000)
    os._exit(0)
while not os.path.exists({note!r}): time.sleep(0.01)
"""


def model_file(path: Path, text: str) -> Path:
    (path / "model.py").write_text(text)
    return path / "model.py"


def own_session(path: Path) -> str:
    return OWN_SESSION.format(note=str(path / "pid"))


ENDS = {
    "exits": ("import sys\nsys.exit('enough')", "ended with exit status 1: enough"),
    "dies": ("import os\nos.abort()", "was killed by SIGABRT: .*"),
    "prints much": (
        "import os\nfor _ in range(300): os.write(1, b'x' * (1 << 20))\nprint('\\nenough')\nraise SystemExit",
        "ended with exit status 0: enough",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("text", "message"), ENDS.values(), ids=ENDS.keys())
def test_a_process_that_ends(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FxquantError, match=rf"model\.py: its process {message}"):
        open_source(model_file(tmp_path, text))


@pytest.mark.slow
def test_what_it_started_ends_with_it(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    """A process in a session of its own that holds the output open is neither waited for nor left."""
    source = open_source(model_file(tmp_path, own_session(tmp_path) + PLAIN), tiny_folder(), timeout=500)
    assert source.program().graph and not running(int((tmp_path / "pid").read_text()))


@pytest.mark.slow
def test_what_it_started_does_not_outlive_the_time(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="not imported, built and traced within 20 seconds"):
        open_source(model_file(tmp_path, own_session(tmp_path) + "while True: time.sleep(1)"), timeout=20)
    assert not running(int((tmp_path / "pid").read_text()))


@pytest.mark.slow
def test_a_copy_of_it_answers_nothing(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    """A fork goes on behind the import like the process itself."""
    text = "import os\ncopy = os.fork() == 0\n" + PLAIN.replace("return", "if copy: raise ValueError\n    return")
    assert open_source(model_file(tmp_path, text), tiny_folder()).program().graph


@pytest.mark.slow
def test_it_ends_when_the_command_is_killed(tmp_path: Path) -> None:
    """Killed outright, the command cannot end it."""
    note = f"open({str(tmp_path / 'own')!r}, 'w').write(str(os.getpid()))"
    path = model_file(tmp_path, own_session(tmp_path) + f"{note}\nwhile True: pass")
    command = subprocess.Popen([sys.executable, "-c", "from fxquant.tools.main import run; run()", "show", str(path)])
    pids = [int(eventually(lambda name=name: _text(tmp_path / name))) for name in ("pid", "own")]
    assert all(map(running, pids))
    command.kill()
    command.wait()
    assert eventually(lambda: not any(map(running, pids)))


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def running(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip()[:1] not in ("", "Z")


def eventually(condition: Callable[[], Any]) -> Any:
    """What `condition` gives once it is true, within five minutes."""
    for _ in range(3000):
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("never")


@pytest.fixture
def answer() -> Iterator[int]:
    """What the process would write to; a copy, as `main` closes its own."""
    handle = os.memfd_create("answer")
    yield handle
    os.close(handle)


def read(answer: int, status: int = 0, output: bytes = b"") -> Traced:
    return child._read(Path("model.py"), answer, Ended(status, output))


@pytest.mark.parametrize("folder", ("/models/tiny", "/models/50% \\ \u00fc", os.fsdecode(b"/models/\xff")))
def test_answers(answer: int, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders may have any name."""
    traced = Traced('{"a": "\u00fc"}', Path(folder), None, "model.py, fxquant")
    monkeypatch.setattr("fxquant.frontend.build.trace_file", lambda file, checkpoint: traced)
    child_main.main(Path("model.py"), os.dup(answer), None)
    assert read(answer) == traced
    assert read(answer, status=-11) == traced  # it ended after its work was done


def test_errors_come_back(answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, checkpoint: Path | None) -> Traced:
        raise FxquantError(Path(os.fsdecode(b"model\xff.py")), "is a fact.", "A way out.")

    monkeypatch.setattr("fxquant.frontend.build.trace_file", fail)
    child_main.main(Path("model.py"), os.dup(answer), None)
    with pytest.raises(FxquantError, match=r"^model\\udcff\.py: is a fact\. A way out\.$"):
        read(answer)


PROGRAM: dict[str, Any] = {"program": "{}", "checkpoint": "/a", "policy": None, "input_kind": "model.py"}
WRONG: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "its process ended with exit status 0: said"),
    "cut short": (json.dumps(PROGRAM).encode(), "its process ended with exit status 0: said"),
    "no JSON": (b"graph\n", "not JSON"),
    "nested deep": (b"[" * 100_000 + b"\n", "nested more than"),
    "a list": (b"[]\n", "returned something other than a graph"),
    "an error of one word": (b'{"error": "no"}\n', "returned something other than a graph"),
    "numbers": (json.dumps(PROGRAM | {"program": 1}).encode() + b"\n", "returned something other than a graph"),
    "no policy": (json.dumps(PROGRAM | {"policy": 1}).encode() + b"\n", "returned something other than a graph"),
}


@pytest.mark.parametrize(("data", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_answers(answer: int, data: bytes, message: str) -> None:
    os.write(answer, data)
    with pytest.raises(FxquantError, match=rf"model\.py: .*{message}"):
        read(answer, output=b"said\n")


def test_a_large_answer_is_not_read(answer: int) -> None:
    os.truncate(answer, ANSWER_BYTES + 1)
    with pytest.raises(FxquantError, match="returned 536,870,913 bytes, at most 536,870,912 are read"):
        read(answer)
