"""Rounds with Ray's workers: a process of its own, met by a signal after a part of the time that it takes."""

import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from os import killpg
from pathlib import Path

from faults.operations import SIGNALS, Fault
from faults.rounds import Ended, Result, check_again, check_end, foreign_files, look
from faults.scenarios import COMPILE, Scenario, output_files, write_template

NAME = "compile --workers ray"
COMMAND = (*COMPILE, "-p", "data_free.yaml", "--no-verify", "--no-export", "--quiet", "--workers", "ray", "--jobs", "2")
RUN = "from fxquant.tools.main import run; run()"


def ray_rounds(count: int, base: Path) -> list[Result]:
    """`count` of them, in turn with each signal."""
    template = write_template(base / "template-ray")
    scenario = Scenario(NAME, 0, COMMAND, folder=template)
    done = Path(shutil.copytree(template, base / "ray-reference"))
    start = time.monotonic()
    ended = _command(done, None, 0.0)
    seconds = time.monotonic() - start
    if ended.code:
        raise AssertionError(f"{NAME}: {ended.code}: {ended.text}")
    scenario.reference = output_files(done)
    signals = [Fault.KILL, Fault.INT, Fault.TERM]
    return [
        _play(scenario, signals[number % 3], seconds * (number + 1) / (count + 1), base / "ray")
        for number in range(count)
    ]


def _play(scenario: Scenario, fault: Fault, after: float, folder: Path) -> Result:
    result = Result(scenario.name, fault, round(after * 1000), "ms")
    shutil.copytree(scenario.folder, folder)
    foreign = foreign_files(folder)
    ended = _command(folder, fault, after)
    result.after = look(scenario, folder, ended, result, foreign, "after the fault")
    if ended.code:  # it may have been done before
        check_end(scenario, fault, ended, result)
    again = _command(folder, None, 0.0)
    result.again = look(scenario, folder, again, result, foreign, "after the rerun")
    check_again(result, again, folder)
    shutil.rmtree(folder)
    return result


def _command(folder: Path, fault: Fault | None, after: float) -> Ended:
    """In a session of its own, all of which ends with it."""
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, *COMMAND], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
        try:
            if fault is not None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(after)
                process.send_signal(SIGNALS[fault])
            code = process.wait(300)
        finally:
            with suppress(ProcessLookupError):
                killpg(process.pid, signal.SIGKILL)
    return Ended(code, re.sub(r"[│╭╮╰╯─\s]+", " ", (folder / "log.txt").read_text(errors="replace")))
