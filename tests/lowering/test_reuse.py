"""What is the same in an earlier output is copied, what is not is made, and the bytes are those of one go."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from output_folders import POLICY, compile_weights, files_of, same_files, wide_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fxquant import CompileOptions, FxquantError, compile
from fxquant.lowering.output_folder.manifest import MANIFEST, STAMPS, read_manifest
from fxquant.lowering.weights import Unit
from fxquant.lowering.weights.fill import FillJob
from fxquant.tools.main import app

ONE_LAYER = f"extends: {POLICY}\nrules:\n  - {{path: model.layers.0.mlp.down_proj, scheme: FLOAT}}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_model(tmp_path_factory.mktemp("model") / "model", experts=8)


@pytest.fixture(scope="module")
def old(model: Path) -> Path:
    """Do not write to it."""
    return compile_weights(model, model.parent / "old")


@pytest.fixture
def policy(tmp_path: Path) -> str:
    """The policy with one dense linear in float."""
    (tmp_path / "policy.yaml").write_text(ONE_LAYER)
    return str(tmp_path / "policy.yaml")


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the units that are filled."""
    names: list[str] = []
    original = FillJob.fill

    def fill(job: FillJob, unit: Unit) -> object:
        names.append(unit.name)
        return original(job, unit)

    monkeypatch.setattr(FillJob, "fill", fill)
    return names


def test_only_what_the_policy_changed_is_made(
    model: Path, old: Path, policy: str, tmp_path: Path, units: list[str]
) -> None:
    options = CompileOptions(policy=policy, out=tmp_path / "new", verify=False, export=False, reuse=old)
    work = compile(model, options).output.work
    assert units == ["model.layers.0.mlp.down_proj.weight"]
    size = json.loads((model / "config.json").read_text())
    assert (work.copied, work.quantized) == (size["hidden_size"] * size["intermediate_size"] * 2, 0)
    assert work.reused == sum(load.nbytes for load in tensors(tmp_path / "new").values()) - work.copied
    assert same_files(tmp_path / "new", compile_weights(model, tmp_path / "fresh", policy=policy))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_force_takes_over_what_stays(model: Path, old: Path, policy: str, tmp_path: Path, units: list[str]) -> None:
    out = tmp_path / "out"
    for name in (POLICY, policy, POLICY):
        units.clear()
        compile(model, CompileOptions(policy=name, out=out, verify=False, export=False, force=True))
    assert units == ["model.layers.0.mlp.down_proj"]
    assert same_files(out, old)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


@pytest.mark.parametrize("size", [50_000, 300_000])
def test_into_other_files(size: int, model: Path, old: Path, tmp_path: Path, units: list[str]) -> None:
    for name, reuse in (("new", old), ("fresh", None)):
        options = CompileOptions(
            policy=POLICY, out=tmp_path / name, verify=False, export=False, reuse=reuse, max_shard_size=size
        )
        work = compile(model, options).output.work
        assert bool(reuse) == (work.quantized == work.copied == 0)
    assert same_files(tmp_path / "new", tmp_path / "fresh")
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 2


def test_a_file_that_stays_the_same_is_copied_in_one_range(
    model: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a page's start to the end of the file: what a file system with shared blocks copies by reference."""
    calls: list[tuple[int, int, int]] = []
    original = os.copy_file_range

    def copy(source: int, target: int, count: int, start: int, offset: int) -> int:
        calls.append((count, start, offset))
        return original(source, target, count, start, offset)

    monkeypatch.setattr(os, "copy_file_range", copy)
    compile(model, CompileOptions(policy=POLICY, out=tmp_path / "new", verify=False, export=False, reuse=old))
    (file,) = (tmp_path / "new").glob("*.safetensors")
    ((count, start, offset),) = calls
    assert start == offset and start % 4096 == 0 and start + count == file.stat().st_size


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP])
def test_where_the_system_cannot_copy_it_is_done_by_hand(
    code: int, model: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    compile(model, CompileOptions(policy=POLICY, out=tmp_path / "new", verify=False, export=False, reuse=old))
    assert same_files(tmp_path / "new", old)


def with_other_norms(file: Path) -> None:
    """The same header, other bytes."""
    save_file({n: t + 1 if t.dtype is torch.bfloat16 else t for n, t in load_file(file).items()}, file)


TOUCHED: dict[str, Callable[[Path], object]] = {"time": os.utime, "bytes": with_other_norms}


@pytest.mark.parametrize("how", TOUCHED)
def test_a_source_that_was_touched_is_read_again(how: str, tmp_path: Path) -> None:
    model = wide_model(tmp_path / "model", experts=4)
    old = compile_weights(model, tmp_path / "old")
    TOUCHED[how](next(model.glob("*.safetensors")))
    options = CompileOptions(policy=POLICY, out=tmp_path / "new", verify=False, export=False, reuse=old)
    assert compile(model, options).output.work.reused == 0
    assert same_files(tmp_path / "new", compile_weights(model, tmp_path / "fresh"))


def test_without_the_stamps_nothing_is_trusted(model: Path, tmp_path: Path) -> None:
    old = compile_weights(model, tmp_path / "old")
    (old / STAMPS).unlink()
    options = CompileOptions(policy=POLICY, out=tmp_path / "new", verify=False, export=False, reuse=old)
    assert compile(model, options).output.work.reused == 0


def test_a_damaged_header_and_a_folder_of_others_are_refused(model: Path, tmp_path: Path) -> None:
    old = compile_weights(model, tmp_path / "old")
    (file,) = old.glob("*.safetensors")
    file.write_bytes(file.read_bytes().replace(b'"format":"pt"', b'"format":"tp"'))
    options = CompileOptions(policy=POLICY, out=tmp_path / "new", verify=False, export=False, reuse=old)
    with pytest.raises(FxquantError, match="is not as it was written"):
        compile(model, options)
    with pytest.raises(FxquantError, match="not an output of fxquant"):
        compile(model, CompileOptions(policy=POLICY, out=tmp_path / "new", verify=False, export=False, reuse=model))
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()


def test_the_manifest_tells_key_and_digest_of_every_tensor(model: Path, old: Path) -> None:
    manifest = read_manifest(old)
    names = {
        f"{unit}.{suffix}" if suffix else unit for unit, record in manifest.units.items() for suffix in record.digests
    }
    assert names == set(tensors(old))
    assert all(
        len(record.key) == 32 and all(len(d) == 32 for d in record.digests.values())
        for record in manifest.units.values()
    )
    assert set(manifest.sources) == {file.name for file in model.glob("*.safetensors")}
    assert STAMPS not in manifest.files and "mtime" not in (old / MANIFEST).read_text()


def test_another_time_of_the_source_changes_the_stamps_only(tmp_path: Path) -> None:
    model = wide_model(tmp_path / "model", experts=4)
    output = compile_weights(model, tmp_path / "one")
    os.utime(next(model.glob("*.safetensors")), ns=(1, 1))
    other = compile_weights(model, tmp_path / "other")
    assert files_of(output, (STAMPS,)) == files_of(other, (STAMPS,)) and not same_files(output, other)


def test_the_report_says_how_many_bytes_each(model: Path, old: Path, policy: str, tmp_path: Path) -> None:
    command = ["compile", str(model), "-p", policy, "-o", str(tmp_path / "new"), "--reuse", str(old), "--no-verify"]
    result = CliRunner().invoke(app, [*command, "--no-export", "--json"], catch_exceptions=False)
    work = json.loads(result.stdout)["bytes"]
    assert work["quantized"] == work["resumed"] == 0 and work["reused"] > work["copied"] > 0
