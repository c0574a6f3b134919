"""A fault at any operation on files leaves nothing wrong under a final name, and the same command completes."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults.campaign import plan
from faults.operations import Fault, Injector
from faults.rounds import Ended, Result, check_again, check_end, look
from faults.scenarios import Scenario, output_files, scenarios
from places import ROOT

from fxquant.lowering.weights.reserve import reserve
from fxquant.storage.work_folder import MARKER, Kind, WorkFolder


@pytest.mark.slow
def test_the_command_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/faults.py", "--rounds", "20", "--jobs", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"| {scenario.name} | " in done.stdout for scenario in scenarios())


def work(folder: Path) -> None:
    """A little of everything that compilers do with files."""
    (folder / "made").mkdir()
    with (folder / "made" / "text").open("w") as stream:
        stream.write("0123456789" * 1000)
    handle = os.open(folder / "made" / "bytes", os.O_RDWR | os.O_CREAT)
    done, data = 0, memoryview(b"ab" * 500)
    while done < len(data):
        done += os.pwrite(handle, data[done:], done)
    os.fsync(handle)
    os.close(handle)
    shutil.copyfile(folder / "made" / "text", folder / "made" / "copy")
    (folder / "made").rename(folder / "done")
    assert (folder / "done" / "copy").read_text() == "0123456789" * 1000


def forked(folder: Path, injector: Injector, then: Callable[[BaseException | None], int]) -> int:
    """`work` in a child under `injector`; how it ended."""
    child = os.fork()
    if child == 0:
        error: BaseException | None = None
        try:
            injector.install()
            work(folder)
        except BaseException as raised:
            error = raised
        injector.active = False
        os._exit(then(error))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counted(folder: Path, base: Path) -> list[str]:
    """The kinds of the operations of `work`."""

    def write(error: BaseException | None) -> int:
        (base / "log").write_text("\n".join(injector.log))
        return int(error is not None)

    folder.mkdir()
    injector = Injector(folder)
    assert forked(folder, injector, write) == 0
    return (base / "log").read_text().splitlines()


def test_operations_are_counted_in_order(tmp_path: Path) -> None:
    log = counted(tmp_path / "a", tmp_path)
    assert log[:4] == ["mkdir", "create", "write", "close"]
    assert log[4:8] == ["create", "pwrite", "fsync", "close"]
    assert {"sendfile", "read", "rename"} <= set(log) and log == counted(tmp_path / "b", tmp_path)


@pytest.mark.parametrize("fault", [Fault.KILL, Fault.TERM])
def test_signals_come_at_the_operation(tmp_path: Path, fault: Fault) -> None:
    log = counted(tmp_path / "a", tmp_path)
    (tmp_path / "b").mkdir()
    ended = forked(tmp_path / "b", Injector(tmp_path / "b", log.index("rename"), fault), lambda error: 0)
    assert ended == {Fault.KILL: -9, Fault.TERM: -15}[fault]
    assert (tmp_path / "b" / "made" / "copy").exists() and not (tmp_path / "b" / "done").exists()


@pytest.mark.parametrize("kind", ["mkdir", "create", "write", "pwrite", "fsync", "sendfile", "rename", "read"])
def test_one_call_fails(tmp_path: Path, kind: str) -> None:
    log = counted(tmp_path / "a", tmp_path)
    (tmp_path / "b").mkdir()
    injector = Injector(tmp_path / "b", log.index(kind), Fault.BROKEN)
    code = forked(tmp_path / "b", injector, lambda error: error.errno or 0 if isinstance(error, OSError) else 0)
    # shutil copies in another way where sendfile fails at once
    assert code == (0 if kind == "sendfile" else errno.EIO)


def test_a_full_disk_stays_full(tmp_path: Path) -> None:
    log = counted(tmp_path / "a", tmp_path)
    (tmp_path / "b").mkdir()
    injector = Injector(tmp_path / "b", log.index("pwrite"), Fault.FULL)

    def then(error: BaseException | None) -> int:
        injector.active = True
        try:
            (tmp_path / "b" / "more").mkdir()
        except OSError as again:
            return again.errno or 0
        return 0

    assert forked(tmp_path / "b", injector, then) == errno.ENOSPC


def test_half_of_a_call_is_done(tmp_path: Path) -> None:
    log = counted(tmp_path / "a", tmp_path)
    for number, kind in enumerate(log):
        if kind in ("read", "write", "pwrite", "sendfile"):
            folder = tmp_path / f"b{number}"
            folder.mkdir()
            injector = Injector(folder, number, Fault.SHORT)
            # all went well, by one call more than without the fault
            assert forked(folder, injector, lambda error, it=injector: len(it.log) if error is None else 0) >= len(log)
            assert (folder / "done" / "bytes").read_bytes() == b"ab" * 500


def test_every_kind_of_operation_has_its_rounds() -> None:
    scenario = Scenario("one", 1, (), operations=["mkdir", *["pwrite"] * 30, "fsync", *["read"] * 30, "rename"])
    rounds = plan(scenario, 60)
    assert {fault for _, fault, _ in rounds} == set(Fault)
    assert {scenario.operations[at] for _, fault, at in rounds if fault is Fault.KILL} == set(scenario.operations)
    assert len({(fault, at) for _, fault, at in rounds}) == len(rounds) == 60
    assert {scenario.operations[at] for _, fault, at in rounds if fault is Fault.SHORT} == {"pwrite", "read"}


def test_calls_that_do_a_part_are_called_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: write(handle, data[: len(data) // 2 + 1], offset))
    monkeypatch.setattr(os, "pread", lambda handle, length, offset: read(handle, length // 2 + 1, offset))
    header = bytes(range(256)) * 16
    file = SimpleNamespace(name="weights", nbytes=len(header) + 8, header=header)
    reserve([file], tmp_path)  # type: ignore[list-item]
    assert (tmp_path / "weights").read_bytes() == header + bytes(8)
    folder = WorkFolder(tmp_path / "out", Kind.PARTIAL)
    with folder.held():
        assert (folder.path / MARKER).read_bytes() == folder.marker
    assert folder.check()


@pytest.fixture
def scenario(tmp_path: Path) -> Scenario:
    out = tmp_path / "work" / "out"
    out.mkdir(parents=True)
    (out / "a").write_bytes(b"old")
    return Scenario("one", 1, (), reference={"a": b"new"}, before=output_files(tmp_path))


RIGHT = Ended(0, "done")


@pytest.mark.parametrize(
    ("content", "ended", "state", "wrong"),
    [
        (b"new", RIGHT, "new", ""),
        (b"old", Ended(1, "error"), "old", ""),
        (
            b"new",
            Ended(130, "interrupted: nothing was left under the final name."),
            "new",
            "says that nothing was left",
        ),
        (b"old", RIGHT, "old", "exit 0, and the output is old"),
        (b"nex", Ended(1, "error"), "wrong", "wrong bytes under the final name"),
        (b"old", Ended(1, "Traceback (most recent call last)"), "old", "a traceback"),
        (b"old", Ended(1, "Finished work is kept in work/out.partial: resume it."), "old", "was kept"),
    ],
)
def test_what_lies_there_is_judged(
    tmp_path: Path, scenario: Scenario, content: bytes, ended: Ended, state: str, wrong: str
) -> None:
    (tmp_path / "work" / "out" / "a").write_bytes(content)
    result = Result("one", Fault.KILL, 0, "mkdir")
    assert look(scenario, tmp_path, ended, result, {}, "then") == state
    assert len(result.wrong) == bool(wrong) and wrong in "".join(result.wrong)


def test_a_changed_file_of_the_user_is_seen(tmp_path: Path, scenario: Scenario) -> None:
    (tmp_path / "work" / "mine").write_text("changed")
    result = Result("one", Fault.KILL, 0, "mkdir")
    look(scenario, tmp_path, Ended(1, ""), result, {"work/mine": b"mine"}, "then")
    assert result.wrong == ["then: files of the user changed"]


def test_the_end_and_the_rerun_are_judged(tmp_path: Path, scenario: Scenario) -> None:
    def check(fault: Fault, code: int) -> list[str]:
        result = Result("one", fault, 0, "mkdir")
        check_end(scenario, fault, Ended(code, "text"), result)
        return result.wrong

    assert [check(Fault.KILL, -9), check(Fault.BROKEN, 1), check(Fault.SHORT, 0), check(Fault.INT, 130)] == [[]] * 4
    assert all([check(Fault.KILL, 0), check(Fault.BROKEN, 70), check(Fault.SHORT, 1), check(Fault.INT, 1)])

    def again(after: str, state: str, ended: Ended) -> list[str]:
        result = Result("one", Fault.KILL, 0, "mkdir", after, state)
        check_again(result, ended, tmp_path)
        return result.wrong

    assert again("absent", "new", RIGHT) == [] == again("new", "new", Ended(1, "exists. Pass --force to replace it"))
    assert again("absent", "new", Ended(1, "exists. Pass --force to replace it"))
    assert again("absent", "old", Ended(1, "error"))
    (tmp_path / "work" / "out.partial").mkdir()
    assert again("absent", "new", RIGHT) == ["the rerun leaves ['out.partial']"]
