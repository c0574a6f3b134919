"""Damaged and hostile files end in success or in an FxquantError; the campaign over them sees whatever else happens."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from fuzzing.campaign import Campaign, Row
from fuzzing.mutators import JsonMutator
from fuzzing.seeds import write_seeds
from fuzzing.targets import TARGETS, WORKER, Target, make_case
from fuzzing.worker import FORBIDDEN, MEMORY, REFUSED, TRACEBACK, load_finding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import ROOT

from fxquant.errors import FxquantError

VERBS = ("verify OUT", "show OUT --fused", "eval OUT", "run OUT", "convert OUT")
"""They take a second a case: see the campaign."""
WORKERS = [target.name for target in TARGETS if target.allowed == WORKER]
FEWER = {"graph": 60, "float graph": 60} | dict.fromkeys(WORKERS, 10)
QUICK = [target for target in TARGETS if target.name not in VERBS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_seeds(folder / "seeds")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("target", QUICK, ids=lambda target: target.name)
def test_it_is_refused_or_read(base: Path, target: Target) -> None:
    mutators, folder = target.mutators(base / "seeds"), base / "seeds" / target.seed
    originals = {name: (folder / name).read_bytes() for name in mutators}

    @settings(max_examples=FEWER.get(target.name, 200), suppress_health_check=list(HealthCheck))
    @given(random=st.randoms(note_method_calls=False, use_true_random=False))
    def check(random: Random) -> None:
        name, data = make_case(mutators, random)
        (folder / name).write_bytes(data)
        try:
            target.read(folder)
        except FxquantError as error:
            str(error).encode()
        finally:
            (folder / name).write_bytes(originals[name])

    target.read(folder)
    check()


@pytest.mark.slow
def test_the_command_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/fuzz.py", "--cases", "2000", "--jobs", "1", "--findings", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == [*(target.name for target in TARGETS), "**all**"]
    assert all(int(row[1].replace(",", "")) > 0 for row in rows)


def campaign(tmp_path: Path, read: Callable[[Path], object], cases: int = 3) -> Row:
    """Some cases of a target that reads so; its row."""
    (tmp_path / "seeds" / "one").mkdir(parents=True)
    for name in ("checkpoint", "texts"):
        (tmp_path / "seeds" / name).mkdir()
    (tmp_path / "seeds" / "one" / "a.json").write_text('{"a": [1, 2, {"b": "c"}], "d": 0.5}')
    calls = iter(range(1 << 20))
    target = Target("bad", "one", ("a.json",), lambda folder: read(folder) if next(calls) else None, cases)
    run = Campaign(tmp_path, [target], cases, 1, seed=3, sound=False)
    run.run()
    return run.rows["bad"]


def refuse(folder: Path) -> None:
    raise FxquantError(folder, "no.", "")


def test_refusals_are_counted(tmp_path: Path) -> None:
    row = campaign(tmp_path, refuse)
    assert row.counts == {REFUSED: 3} and row.findings == [] and 0 < row.memory < 2e9


@pytest.mark.parametrize(
    ("read", "kind", "fact"),
    [
        (lambda folder: (folder / "b")["c"], TRACEBACK, "TypeError"),
        (lambda folder: bytearray(3 << 30), MEMORY, "MemoryError"),
        (lambda folder: (folder.parents[2] / "outside").write_text(""), FORBIDDEN, "writes"),
        (lambda folder: (folder.parents[2] / "made").mkdir(exist_ok=True), FORBIDDEN, "os.mkdir"),
        (lambda folder: os.system("true"), FORBIDDEN, "os.system"),
        (lambda folder: exec("1"), FORBIDDEN, "runs code of <string>"),
        (lambda folder: __import__("socket").socket(), FORBIDDEN, "socket."),
        (lambda folder: os.kill(os.getpid(), 9), TRACEBACK, "ended with status 9"),
    ],
)
def test_whatever_else_happens_is_found(tmp_path: Path, read: Callable, kind: str, fact: str) -> None:
    row = campaign(tmp_path, read)
    assert set(row.counts) <= {kind, "accepted"} and row.counts[kind] == 3
    assert row.findings[0].kind == kind and fact in row.findings[0].fact
    finding, data = load_finding(row.findings[0].save(tmp_path / "findings"))
    assert finding == row.findings[0] and data == make_case(targets_of(tmp_path), Random(f"3 bad {finding.index}"))[1]


def targets_of(folder: Path) -> dict[str, JsonMutator]:
    return {"a.json": JsonMutator((folder / "seeds" / "one" / "a.json").read_bytes())}


def test_what_takes_too_long_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzzing.guard.SECONDS", 0.3)
    monkeypatch.setattr("fuzzing.worker.SECONDS", 0.3)
    row = campaign(tmp_path, lambda folder: time.sleep(5), cases=1)
    assert row.counts == {"hang": 1} and row.seconds < 4


def test_a_run_that_is_stopped_has_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzzing.campaign.SMALLEST_CHUNK", 2)
    looks = iter(range(1 << 20))

    def look(self: Campaign, chunk: object) -> object:
        if self.rows["bad"].counts.total() >= 4 or next(looks) > 2000:
            raise KeyboardInterrupt
        return original(self, chunk)  # type: ignore[arg-type]

    original = Campaign._look
    monkeypatch.setattr(Campaign, "_look", look)
    assert 4 <= campaign(tmp_path, refuse, cases=40).counts.total() < 40


def test_a_case_is_the_same_again() -> None:
    mutator, other = (JsonMutator(b'{"a": [1, 2, {"b": "c"}], "d": 0.5}') for _ in range(2))
    cases = [mutator(Random(f"{number}")) for number in range(300)]
    assert cases == [other(Random(f"{number}")) for number in range(300)]
    assert len(set(cases)) > 200


def test_messages_can_be_written_and_end() -> None:
    error = FxquantError("a\udcff", "b" * 10**6, "c")
    assert str(error).encode() and len(str(error)) < 6000
    assert (error.place, error.remedy) == ("a\\udcff", "c") and error.fact.endswith("b …")
