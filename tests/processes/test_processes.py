"""Commands in processes of their own: their end is the end of all that they started, and output costs nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fxquant.inputs.limits import OUTPUT_BYTES
from fxquant.processes.command import Ended, run_to_end

SESSION = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open(sys.argv[1], "w").write(str(os.getpid()))
        time.sleep(1000)
    os._exit(0)
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
"""
"""Starts a process in a session of its own, whose parent is gone and which holds the output open."""
THEN_NOTHING, THEN_SLEEP, THEN_DIE = "", "time.sleep(1000)", "os.abort()"


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], Any]) -> Any:
    """What `condition` gives once it is true, within a minute."""
    for _ in range(3000):
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("never")


def number(file: Path) -> int:
    return int(eventually(lambda: file.is_file() and file.read_text()))


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return tmp_path / "pid"


def test_what_it_was_and_what_it_said() -> None:
    assert run_to_end(python("print('yes'); raise SystemExit(3)"), 60) == Ended(3, b"yes\n")
    ended = run_to_end(python("import os, sys; print('one\\n\\n two \\n\\n', flush=True); os.abort()"), 60)
    assert (ended.status, ended.last_line) == (-signal.SIGABRT, "two")
    assert run_to_end(["/bin/true"], 60).last_line == ""


def test_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """No input, no file of this process but those named, the environment."""
    secret, given = os.memfd_create("secret"), os.memfd_create("given")
    os.set_inheritable(secret, True)
    code = "import os; print(repr(os.read(0, 9)), os.environ['WORD'], *sorted(map(int, os.listdir('/proc/self/fd'))))"
    ended = run_to_end(python(code), 60, (given,), os.environ | {"WORD": "here"})
    empty, word, *numbers = ended.output.decode().split()
    os.close(secret), os.close(given)
    assert (empty, word) == ("b''", "here")
    assert given in map(int, numbers) and secret not in map(int, numbers) and len(numbers) == 5  # and the folder itself


@pytest.mark.parametrize(("then", "status"), ((THEN_NOTHING, 0), (THEN_DIE, -signal.SIGABRT)))
def test_a_session_of_its_own_ends_with_the_command(note: Path, then: str, status: int) -> None:
    start = time.monotonic()
    assert run_to_end(python(SESSION + then, note), 600).status == status
    assert not running(number(note)) and time.monotonic() - start < 60


def test_a_session_of_its_own_does_not_outlive_the_time(note: Path) -> None:
    with pytest.raises(TimeoutError, match="still running after 2 seconds"):
        run_to_end(python(SESSION + THEN_SLEEP, note), 2)
    assert not running(number(note))


def test_many_generations_end(tmp_path: Path) -> None:
    """Each leaves its parent; some begin while others are ended."""
    code = (
        "import os, sys, time\n"
        "for turn in range(40):\n"
        "    if os.fork(): time.sleep(0.02 * (turn % 3)); os._exit(0)\n"
        "    os.setsid(); open(f'{sys.argv[1]}/{os.getpid()}', 'w').close()\n"
        "time.sleep(1000)"
    )
    assert (
        run_to_end(python("import os\nif os.fork() == 0:\n    " + code.replace("\n", "\n    "), tmp_path), 60).status
        == 0
    )
    time.sleep(0.2)
    assert not [file for file in tmp_path.iterdir() if running(int(file.name))]


def test_output_is_read_and_only_its_end_kept() -> None:
    before = _resident()
    size, block = 300 << 20, 1 << 20
    code = f"import os\nfor _ in range({size // block}): os.write(1, b'x' * {block})\nos.write(2, b'last')"
    ended = run_to_end(python(code), 120)
    assert ended.status == 0 and len(ended.output) == OUTPUT_BYTES and ended.output.endswith(b"xxlast")
    assert _resident() - before < 32 << 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_interrupt_ends_all(note: Path) -> None:
    def interrupt() -> None:
        number(note)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_to_end(python(SESSION + THEN_SLEEP, note), 60)
    thread.join()
    assert not running(number(note))


@pytest.mark.parametrize("end", (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP))
def test_all_end_with_the_process_that_asked(note: Path, end: signal.Signals) -> None:
    """In whatever way, while a copy of it holds the pipes open."""
    code = (
        "import os, sys, time\nfrom fxquant.processes.command import run_to_end\nimport threading\n"
        "threading.Timer(0.5, lambda: os.fork() or time.sleep(30)).start()\n"
        "run_to_end(sys.argv[1:], 600)"
    )
    asking = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, *python(SESSION + THEN_SLEEP, note)])
    pid = number(note)
    assert running(pid)
    time.sleep(1)
    asking.send_signal(end)
    asking.wait()
    eventually(lambda: not running(pid))


def test_the_command_ends_with_its_supervisor(note: Path) -> None:
    """Which only the system ends before its time."""
    code = (
        "import os, sys, time\nfrom fxquant.processes.command import end_with\nend_with(int(sys.argv[2]))\n"
        "open(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(1000)"
    )
    asking = "import subprocess, sys, os, time; subprocess.Popen([*sys.argv[1:], str(os.getpid())]); time.sleep(1000)"
    command: Sequence[str] = [sys.executable, "-c", asking, sys.executable, "-c", code, str(note)]
    process = subprocess.Popen(command)
    pid = number(note)
    process.kill()
    process.wait()
    eventually(lambda: not running(pid))
    assert subprocess.run([sys.executable, "-c", code, str(note), "1"], check=False).returncode == -signal.SIGKILL
