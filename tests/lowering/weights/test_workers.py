"""However many workers, wherever they are: the same bytes, in little memory, and a full disk is told."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from output_folders import POLICY, compile_weights, same_files, wide_model
from tiny import write_checkpoint
from typer.testing import CliRunner

from fxquant import CompileOptions, FxquantError, compile
from fxquant.errors import StoppedError
from fxquant.tools.main import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_model(tmp_path_factory.mktemp("model") / "model", experts=16)


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    return compile_weights(model, model.parent / "whole", jobs=1)


@pytest.mark.parametrize("jobs", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(jobs: int, model: Path, whole: Path, tmp_path: Path) -> None:
    assert same_files(compile_weights(model, tmp_path / "out", jobs), whole)


def test_options_that_do_not_go_together(model: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    wrong = [(["--workers", "spark"], "local, ray"), (["--address", "auto"], "--workers ray")]
    wrong.append((["--workers", "ray", "--address", "auto", "--jobs", "4"], "a cluster has one per core"))
    for options, words in wrong:
        with pytest.raises(FxquantError, match=words):
            runner.invoke(app, ["compile", str(model), *options], catch_exceptions=False)


# a full disk


@contextmanager
def disk_of(size: int, folder: Path) -> Iterator[Callable[[int], object]]:
    """`folder` as a file system of so many bytes; call what is given to change the size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield lambda size: subprocess.run([*mount, f"remount,size={size}", "tmpfs", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_told_before_a_weight_is_read(model: Path, whole: Path, tmp_path: Path) -> None:
    with disk_of(weight_bytes(whole) // 2, tmp_path / "disk"):
        out = tmp_path / "disk" / "out"
        with pytest.raises(FxquantError, match="bytes to write, .* free"):
            compile_weights(model, out)
        assert not out.exists() and not out.with_name("out.partial").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_meanwhile_stops_it_and_it_goes_on(model: Path, whole: Path, tmp_path: Path) -> None:
    """Weights have their place from the start; documents find none."""
    with disk_of(weight_bytes(whole) + (1 << 17), tmp_path / "disk") as resize:
        out = tmp_path / "disk" / "out"
        with pytest.raises(StoppedError, match="No space left on device.*the same command resumes it"):
            compile_weights(model, out)
        assert not out.exists()
        resize(weight_bytes(whole) * 2)
        report = compile(model, CompileOptions(policy=POLICY, out=out, verify=False, export=False))
        assert (report.output.work.quantized, report.output.work.copied) == (0, 0)
        assert same_files(out, whole)


def test_a_disk_that_cannot_reserve_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoppedError, match="cannot reserve .* bytes: No space left"):
        compile_weights(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_errors_of_the_disk_keep_what_is_finished(
    call: str, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, original = iter(range(10**6)), getattr(os, call)

    def fails(handle: int, *arguments: object) -> object:
        if next(count) == (200 if call == "pwrite" else 3):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(handle, *arguments)

    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="Input/output error"):
        patch.setattr(os, call, fails)
        compile_weights(model, tmp_path / "out", jobs=1)
    report = compile(model, CompileOptions(policy=POLICY, out=tmp_path / "out", verify=False, export=False))
    assert report.output.work.resumed > 0 and same_files(tmp_path / "out", whole)


# memory

MEASURE = """
import resource, sys
from fxquant import CompileOptions, compile
from fxquant.lowering.weights import Workers
names = {"policy": "deepseek_w4a8_dynamic", "out": sys.argv[2]}
options = CompileOptions(**names, verify=False, export=False, workers=Workers(jobs=2))
with open("/proc/self/clear_refs", "w") as stream:
    stream.write("5")
compile(sys.argv[1], options)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak(model: Path, out: Path) -> int:
    """Bytes that a process of its own needed to compile."""
    command = [sys.executable, "-c", MEASURE, str(model), str(out)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_experts_and_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    """A small model beside one of 390 MB, of which a single tensor has 68."""
    small = write_checkpoint(tmp_path / "small", n_group=1, topk_group=1)
    shape = {"hidden_size": 1024, "moe_intermediate_size": 1024, "n_routed_experts": 20, "vocab_size": 33_000}
    large = write_checkpoint(tmp_path / "large", n_group=1, topk_group=1, first_k_dense_replace=0, **shape)
    grown = peak(large, tmp_path / "out_large") - peak(small, tmp_path / "out_small")
    # two workers with a block of rows each, what they make of it, and the allocator's share: a tenth of the model
    assert grown < 40 << 20
