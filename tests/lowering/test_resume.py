"""Work that is killed, stopped or refused: what is finished stays, and the result is that of one go."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from forked import forked
from kills import Killed, stop_after
from output_folders import compile_weights, files_of, finished, same_files, wide_model

from fxquant import CompileOptions, FxquantError, compile
from fxquant.errors import StoppedError
from fxquant.lowering.destination import open_destination
from fxquant.lowering.finish import Places
from fxquant.lowering.weights import Filled, Unit
from fxquant.lowering.weights.fill import FillJob
from fxquant.lowering.workspace import open_workspace
from fxquant.storage.safetensors import read_header

POLICY = "deepseek_w4a8_dynamic"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_model(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    """The output of one go."""
    return compile_weights(model, model.parent / "whole")


# one process


def test_it_goes_on_where_it_was(model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(20, patch, Killed())
        compile_weights(model, out, jobs=1)
    assert not out.exists() and finished(out) == 20
    begun = stop_after(10**6, monkeypatch, Killed())
    report = compile(model, CompileOptions(policy=POLICY, out=out, verify=False, export=False))
    assert same_files(out, whole) and not out.with_name("out.partial").exists()
    work, units = report.output.work, json.loads((out / "fxquant_manifest.json").read_text())["units"]
    assert len(begun) == len(units) - 20 and work.resumed > 0
    assert work.resumed + work.quantized + work.copied == sum(
        tensor.nbytes for file in report.output.files for tensor in file.tensors
    )


def test_a_line_that_was_cut_off_is_forgotten(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(5, patch, Killed())
        compile_weights(model, out, jobs=1)
    path = Places(out).journal
    path.write_bytes(path.read_bytes()[:-7])
    begun = stop_after(10**6, monkeypatch, Killed())
    assert same_files(compile_weights(model, out), whole)
    assert len(begun) == len(json.loads((out / "fxquant_manifest.json").read_text())["units"]) - 4


def test_bytes_of_an_earlier_run_are_proven(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines outlive a crash of the machine, and damage of the disk, that the bytes they speak of may not."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(30, patch, Killed())
        compile_weights(model, out, jobs=1)
    places = Places(out)
    done = [json.loads(line)["unit"] for line in places.journal.read_text().splitlines() if '{"unit"' in line]
    (weights,) = places.files.glob("*.safetensors")
    unit = next(name for name in done if "experts" in name)
    lost, data = read_header(weights)[f"{unit}.weight"], bytearray(weights.read_bytes())
    data[lost.start : lost.end] = bytes(lost.nbytes)
    weights.write_bytes(data)
    begun = stop_after(10**6, monkeypatch, Killed())
    assert same_files(compile_weights(model, out), whole)
    assert len(begun) == len(json.loads((out / "fxquant_manifest.json").read_text())["units"]) - 29


def test_documents_of_other_options_do_not_stay(
    model: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its documents were written, then run without some of them."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("fxquant.lowering.output.write_exported", lambda program, folder: (folder / "x.pt2").touch())
        patch.setattr("fxquant.lowering.output._write_manifest", lambda *arguments: (_ for _ in ()).throw(Killed()))
        compile(model, CompileOptions(policy=POLICY, out=out, verify=False, export=True))
    assert list(Places(out).files.glob("*.pt2"))
    assert same_files(compile_weights(model, out), whole)


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "policy": (lambda model: None, {"policy": "float"}, "work under policy deepseek_w4a8_dynamic, this is float"),
    "target": (lambda model: None, {"target": "mindie"}, "work for target ascend, this is mindie"),
    "shards": (lambda model: None, {"max_shard_size": 100_000}, "other weight files"),
    "source": (lambda model: os.utime(next(model.glob("*.safetensors"))), {}, "model.safetensors has changed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_work_is_refused_with_the_reason_until_it_is_discarded(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = wide_model(tmp_path / "model", experts=4), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(3, patch, Killed())
        compile_weights(model, out, jobs=1)
    action, changed, reason = CHANGES[change]
    action(model)
    options = CompileOptions(**{"policy": POLICY, "out": out, "verify": False, "export": False, **changed})
    with pytest.raises(FxquantError, match=reason) as caught:
        compile(model, options)
    assert "--restart" in caught.value.remedy and finished(out) == 3
    report = compile(model, CompileOptions(**{**vars(options), "restart": True}))
    assert report.output.work.resumed == 0 and out.is_dir()


def test_another_version_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(3, patch, Killed())
        compile_weights(model, out, jobs=1)
    monkeypatch.setattr("fxquant.lowering.output.__version__", "0.0.1")
    with pytest.raises(FxquantError, match=r"work of fxquant 0\.1\.0, this is 0\.0\.1"):
        compile_weights(model, out)


def test_two_at_once_are_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_workspace(open_destination(out, False, []), False) as space:
        space.clear()
        with pytest.raises(FxquantError, match="another fxquant process is using it"):
            compile_weights(model, out)
        assert space.folder.is_dir()
        space.owned = False


def test_what_the_world_stops_can_go_on(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="the same command resumes it") as caught:
        stop_after(8, patch, StoppedError("file", "cannot be read: Input/output error.", "Repair the disk."))
        compile_weights(model, out, jobs=1)
    assert caught.value.place == "file" and not out.exists()
    assert same_files(compile_weights(model, out), whole)


@pytest.mark.parametrize(("when", "reason"), [("gone", "cannot be opened again"), ("touched", "changed while")])
def test_a_source_that_changes_meanwhile_stops_it(
    when: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = wide_model(tmp_path / "model", experts=4), tmp_path / "out"
    (file,) = model.glob("*.safetensors")
    original = FillJob.fill
    count = iter(range(10**6))

    def fill(job: FillJob, unit: Unit) -> object:
        if next(count) == 3:
            file.rename(tmp_path / "elsewhere") if when == "gone" else os.utime(file)
        return original(job, unit)

    with monkeypatch.context() as patch, pytest.raises(StoppedError, match=reason):
        patch.setattr(FillJob, "fill", fill)
        compile_weights(model, out, jobs=1)
    assert finished(out) == 3 and not out.exists()
    if when == "gone":
        (tmp_path / "elsewhere").rename(file)
        compile_weights(model, out)


# a process that is killed


def compile_slowly(model: Path, out: Path) -> None:
    """Units take as long as if they were large."""
    fill = FillJob.fill

    def slowly(job: FillJob, unit: Unit) -> Filled:
        time.sleep(0.01)
        return fill(job, unit)

    FillJob.fill = slowly  # type: ignore[method-assign]
    compile_weights(model, out, jobs=2)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(model: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL after a random number of finished units, and at random times before and after the weights."""
    chance, out, kills = random.Random(5), tmp_path / "out", []
    while not out.exists():
        process = forked(partial(compile_slowly, model, out))
        goal, late = finished(out) + chance.randint(1, 40), chance.random() * 0.02
        deadline = time.monotonic() + (chance.uniform(0.01, 2.0) if len(kills) % 3 == 0 else 120.0)
        while process.is_alive() and time.monotonic() < deadline and finished(out) < goal:
            time.sleep(0.002)
        time.sleep(late)
        if process.is_alive():
            process.kill()
            kills.append(finished(out))
        process.join()
    assert len(kills) >= 5 and kills == sorted(kills), kills  # no kill loses what was finished
    assert same_files(out, whole)
    print(f"killed {len(kills)} times, with {kills} units finished")


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_finished(model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from fxquant.tools.main import run; run()", "compile", model, "-o", out]
    command += ["-p", POLICY, "--no-verify", "--no-export", "--quiet", "--jobs", "1"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    while finished(out) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (
        process.returncode == 130
        and "the same command resumes it" in " ".join(errors.split())
        and "Traceback" not in errors
    )
    assert not out.exists() and finished(out) >= 3
    assert same_files(compile_weights(model, out), whole)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compile"])
def test_replacing_an_output_survives_an_end_between_its_names(
    command: str, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old output is aside, the new one has not got the name yet. A kill there: test_finish.py."""
    out = tmp_path / "out"
    compile(model, CompileOptions(policy="float", out=out, verify=False, export=False))
    old = files_of(out)
    original = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path == Places(out).files:
            raise Killed
        return original(path, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", rename)
        compile(model, CompileOptions(policy=POLICY, out=out, verify=False, export=False, force=True))
    assert files_of(out) == old
    report = compile(model, CompileOptions(policy=POLICY, out=out, verify=False, export=False, force=True))
    assert report.output.work.quantized == 0 and same_files(out, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
