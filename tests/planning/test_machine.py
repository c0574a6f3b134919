"""What `plan` measures of a machine, in a process of its own."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fxquant.planning.gptq_rates import feedback_work, inverse_work
from fxquant.planning.host_benchmark import COPY, DISK_BYTES, GPTQ, Measuring, disk_rates, kernel_name

FORMS = ((8, 0), (4, 0), (4, 64))
KERNELS = {COPY} | {kernel_name(bits, size, fp8) for bits, size in FORMS for fp8 in (False, True)}


def test_the_measurement(tmp_path: Path) -> None:
    with Measuring(tmp_path / "not" / "yet", seconds=300) as measuring:
        machine = measuring.result()
    assert machine.disk_unknown == "" and machine.disk_read and machine.disk_write
    assert min(machine.kernels.values()) > 0 and machine.kernels.keys() == KERNELS
    assert list(tmp_path.iterdir()) == []


def test_kernels_that_search_are_measured_where_they_are_needed(tmp_path: Path) -> None:
    needed = [kernel_name(4, 64, False, "clip"), kernel_name(8, 0, True, "least_squares"), COPY]
    with Measuring(tmp_path, seconds=300) as measuring:
        machine = measuring.result(needed)
    assert machine.kernels.keys() == KERNELS | set(needed)
    assert 0 < machine.kernels[needed[0]] < machine.kernels[kernel_name(4, 64, False)]


def test_gptq_is_measured_where_it_is_needed(tmp_path: Path) -> None:
    with Measuring(tmp_path, seconds=300) as measuring:
        machine = measuring.result(sorted(GPTQ))
    assert machine.kernels.keys() == KERNELS | GPTQ and min(machine.kernels.values()) > 0
    assert inverse_work(10) == 1000 and feedback_work(4, 128) == 4 * 128 * 256


def test_a_measurement_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.planning.host_benchmark.LAST_WAIT", 0)
    with Measuring(Path("/proc/self"), seconds=0) as measuring:
        machine = measuring.result()
    assert machine.cores > 0 and machine.kernels == {} and machine.disk_unknown


def test_a_folder_that_cannot_be_written() -> None:
    with Measuring(Path("/proc/self"), seconds=300) as measuring:
        machine = measuring.result()
    assert machine.disk_read is None and machine.disk_unknown.startswith("/proc/self cannot be written")
    assert machine.kernels


def test_the_measurement_ends_with_the_command(tmp_path: Path) -> None:
    """Also where the command is killed outright."""
    code = (
        "import pathlib, sys, time; from fxquant.planning.host_benchmark import Measuring\n"
        "measuring = Measuring(pathlib.Path(sys.argv[1]), 300)\n"
        "print(measuring._process.pid, flush=True); time.sleep(300)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout
        stat = Path(f"/proc/{int(command.stdout.readline())}/stat")
        assert stat.exists()
        command.kill()
    end = time.monotonic() + 60
    while stat.exists() and " Z " not in stat.read_text() and time.monotonic() < end:
        time.sleep(0.01)
    assert time.monotonic() < end


def test_measuring_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, fxquant.planning.host_benchmark as m\n"
        f"m.DISK_BYTES = {DISK_BYTES // 16}; print(*m.measure(pathlib.Path({str(tmp_path)!r})))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert min(disk_rates(tmp_path)) > 0
