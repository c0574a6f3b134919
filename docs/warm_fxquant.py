"""`fxquant` for the commands of pages, without the seconds that each start takes: a process that has imported torch and
the package, has traced the shipped example, and forks for every command.

The `fxquant` in `warm_folder()` hands its arguments, folder, environment and open streams to it, and ends with the exit
code of the command; so does `warm_python`, which runs what it reads. What commands compute again from equal arguments
is computed once: calibrations, and what tests/support/remembered.py says.
"""

import atexit
import functools
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fxquant.calibration.calibration_file import CALIBRATION
from fxquant.lowering.output_folder.manifest import MANIFEST, STAMPS

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("fxquant", PYTHON := "warm_python")
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    call = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(call).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(call)
    sys.exit(int(server.recv(16) or b"70"))
"""


@functools.cache
def warm_folder(kept: Path | None = None) -> Path:
    """The folder of a `fxquant` and a `warm_python` whose process is warm; all ends with this process.

    kept    where results are that other processes share, see tests/support/kept.py
    """
    folder = Path(tempfile.mkdtemp())
    address = str(folder / "socket")
    for name in COMMANDS:
        client = folder / name
        client.write_text(CLIENT.format(python=sys.executable, address=address, name=name), encoding="utf-8")
        client.chmod(0o755)
    command = [sys.executable, __file__, address, str(kept or folder / "kept")]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert server.stdout is not None
    server.stdout.readline()  # until it listens
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.communicate)
    return folder


def serve(address: str, kept: str) -> None:
    """Answer calls until the standard input ends, which is when the process that asked for this one is gone."""
    _calibrate_once(Path(address).with_name("calibrations"))
    with _computed_once(Path(kept)), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        os.write(1, b"ready\n")
        while True:
            ready, _, _ = select.select([listener, 0], [], [], 1)
            while _reaped():
                pass
            if 0 in ready:
                return
            if listener in ready:
                call, _ = listener.accept()
                if os.fork() == 0:
                    _answer(call)
                call.close()


def _calibrate_once(folder: Path) -> None:
    """Commands take the calibration of an earlier one on the same text, as from an earlier output of the same name."""
    from fxquant.verbs import compile

    folder.mkdir()
    known_folders, compiled = compile.known_folders, compile._compiled

    def known(destination: Any) -> list[Path]:
        return [*known_folders(destination), *folder.iterdir()]

    def keep(*arguments: Any) -> Any:
        report = compiled(*arguments)
        if report.calibration is not None:
            for name in (MANIFEST, STAMPS, CALIBRATION):
                (folder / str(os.getpid()) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(report.out / name, folder / str(os.getpid()) / name)
        return report

    vars(compile).update(known_folders=known, _compiled=keep)


@contextmanager
def _computed_once(kept: Path) -> Iterator[None]:
    """Traces, reference codes and .pt2 files; the trace of the example is there from the start. Model files are traced
    in forks."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from forked_child import forked_children
    from kept import Kept
    from remembered import codes_once, exported_once, traced_once
    from tiny import float_program

    from fxquant.checkpoint.checkpoint import open_checkpoint

    float_program(open_checkpoint(ROOT / "examples" / "tiny_deepseek_v3"))
    with traced_once(), codes_once(Kept(kept)), exported_once(Kept(kept)), forked_children():
        yield


def _reaped() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _answer(call: socket.socket) -> None:
    """In a process of its own: the command."""
    code = 70
    try:
        size, streams, _, _ = socket.recv_fds(call, 8, 3)
        text = b""
        while len(text) < int.from_bytes(size, "big"):
            text += call.recv(1 << 16)
        name, arguments, folder, environment = json.loads(text)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [name, *arguments]
        if name == PYTHON:
            _python()
        from fxquant.__main__ import run

        run()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        call.sendall(str(code).encode())
        os._exit(0)


def _python() -> None:
    """Run the code that stands in the standard input, as `python -` does, and end."""
    sys.path.insert(0, "")
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(sys.stdin.read(), "<stdin>", "exec"), vars(main))
    sys.exit()


if __name__ == "__main__":
    serve(*sys.argv[1:])
