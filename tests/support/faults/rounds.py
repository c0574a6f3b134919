"""One round: a fault in a copy of a scenario, a look at what lies there, the same command again, another look."""

import os
import re
import shutil
import signal
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from forked import renew_threads

from faults.operations import SIGNALS, Fault, Injector
from faults.scenarios import Scenario, output_files

LOST = 99
"""Exit code of a child that ended in a way that no command ends in."""
REFUSED, INTERRUPTED = 1, 130
LOG, OPERATIONS = "log.txt", "operations.txt"
WORK = re.compile(r"out\.(partial|calibrating|replaced)\b.*|\.?out\.fxquant.*")
"""Names that fxquant may leave beside an output."""
LONGEST = 120


@dataclass
class Ended:
    """How a command ended: its exit code, or minus the signal; what it printed, in one line without the frame."""

    code: int
    text: str


@dataclass
class Result:
    """What a round came to; `wrong` is empty where all was right."""

    scenario: str
    fault: Fault
    at: int
    operation: str
    after: str = ""
    again: str = ""
    wrong: list[str] = field(default_factory=list)


def play(scenario: Scenario, fault: Fault, at: int, folder: Path) -> Result:
    """The round in `folder`, which is made and removed."""
    result = Result(scenario.name, fault, at, scenario.operations[at])
    shutil.copytree(scenario.folder, folder, symlinks=True)
    foreign = foreign_files(folder)
    try:
        ended = command(folder, scenario.command, fault, at)
        result.after = look(scenario, folder, ended, result, foreign, "after the fault")
        check_end(scenario, fault, ended, result)
        again = command(folder, scenario.command)
        result.again = look(scenario, folder, again, result, foreign, "after the rerun")
        check_again(result, again, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def look(scenario: Scenario, folder: Path, ended: Ended, result: Result, foreign: dict[str, bytes], when: str) -> str:
    """`absent`, `old`, `new` or `wrong`: what lies under the final name; and nothing of the user's changed."""
    files = output_files(folder)
    state = (
        "absent"
        if not files
        else "new"
        if files == scenario.reference
        else "old"
        if files == scenario.before
        else "wrong"
    )
    if state == "wrong":
        other = [name for name in {*files, *scenario.reference} if files.get(name) != scenario.reference.get(name)]
        result.wrong.append(f"{when}: wrong bytes under the final name: {sorted(other)[:4]}")
    if foreign_files(folder) != foreign:
        result.wrong.append(f"{when}: files of the user changed")
    for name in re.findall(r"kept in (\S+?)[:.] ", ended.text):
        if not (folder / name).exists() and not Path(name).exists():
            result.wrong.append(f"{when}: says that {name} was kept")
    if "Traceback" in ended.text or ended.code == LOST:
        result.wrong.append(f"{when}: a traceback: {ended.text[-300:]}")
    if ended.code == 0 and state != "new":
        result.wrong.append(f"{when}: exit 0, and the output is {state}")
    if "nothing was left" in ended.text and state == "new":
        result.wrong.append(f"{when}: says that nothing was left, and the output is there")
    return state


def check_end(scenario: Scenario, fault: Fault, ended: Ended, result: Result) -> None:
    """The exit code is one that the fault explains."""
    codes: dict[Fault, tuple[int, ...]] = {
        Fault.SHORT: (0,), Fault.INT: (INTERRUPTED, 0), Fault.FULL: (REFUSED, 0), Fault.BROKEN: (REFUSED, 0),
    }  # fmt: skip
    expected = codes.get(fault) or (-SIGNALS[fault], 128 + SIGNALS[fault])
    if ended.code not in expected:
        result.wrong.append(f"exit {ended.code} after {fault}: {ended.text[-LONGEST:]}")


def check_again(result: Result, again: Ended, folder: Path) -> None:
    """The same command completes; where the first one had, it may say so instead."""
    there = again.code == REFUSED and "--force" in again.text and result.after == "new"
    if again.code != 0 and not there:
        result.wrong.append(f"the rerun ends with {again.code}: {again.text[-3 * LONGEST :]}")
    if result.again != "new":
        result.wrong.append(f"after the rerun the output is {result.again}")
    left = [path.name for path in (folder / "work").iterdir() if WORK.fullmatch(path.name)]
    if left:
        result.wrong.append(f"the rerun leaves {left}")


def foreign_files(folder: Path) -> dict[str, bytes]:
    """Every file that is the user's: all but the output, and work beside it."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        ours = (
            name.parts[0] == "work"
            and len(name.parts) > 1
            and (name.parts[1] == "out" or WORK.fullmatch(name.parts[1]))
        )
        if path.is_file() and not ours and name.as_posix() not in (LOG, OPERATIONS):
            files[name.as_posix()] = path.read_bytes()
    return files


def command(folder: Path, arguments: tuple[str, ...], fault: Fault | None = None, at: int = -1) -> Ended:
    """`fxquant` with these arguments in a forked child in `folder`; the kinds of its operations are left in a file."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        _child(folder, arguments, fault, at)
    _, status = os.waitpid(process, 0)
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", (folder / LOG).read_text(errors="replace"))
    return Ended(os.waitstatus_to_exitcode(status), text)


def _child(folder: Path, arguments: tuple[str, ...], fault: Fault | None, at: int) -> None:
    code = LOST
    try:
        renew_threads()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        sys.argv = ["fxquant", *arguments]
        injector = Injector(folder, at, fault)
        injector.install()
        code = _run()
        injector.active = False
        (folder / OPERATIONS).write_text("\n".join(injector.log))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run() -> int:
    from fxquant.tools.main import run

    try:
        run()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else LOST
    except BaseException:
        traceback.print_exc()
        return LOST
    return 0
