"""Workers on a Ray cluster: machines and drivers die while it works, and the bytes are those of one go."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch
from commands import Fxquant
from output_folders import POLICY, compile_weights, finished, same_files, wide_model
from ray.cluster_utils import Cluster
from safetensors.torch import load_file, save_file
from tiny import write_checkpoint
from typer.testing import CliRunner

from fxquant import CompileOptions, FxquantError, compile
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
from fxquant.errors import StoppedError
from fxquant.lowering.output_folder.layout import StoredTensor
from fxquant.lowering.weights import CheckpointProducer, Place, Unit, WorkerKind, Workers, ray_cluster
from fxquant.lowering.weights.fill import FillJob
from fxquant.schemes.schemes import TensorSpec
from fxquant.tools.main import app
from fxquant.tools.signals import Signals

DRIVER, TOKENS = (Path(__file__).with_name(name) for name in ("ray_driver.py", "ray_tokens.py"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One machine of one core, to which tests add others. A raylet is a process, so a machine is what it started."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_model(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    """The output of local workers."""
    return compile_weights(model, model.parent / "whole")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def driver(model: Path, out: Path, notes: Path, *options: str, seconds: float = 0.04) -> subprocess.Popen:
    """`fxquant compile` on Ray with units of so many seconds, the model named from its folder."""
    command = [sys.executable, DRIVER, seconds, notes, "compile", model.name, "-o", out, "-p", POLICY]
    command += ["--workers", "ray", "--no-verify", "--no-export", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=model.parent, start_new_session=True, **pipes)


def begun(notes: Path) -> dict[str, int]:
    """Node → units that its workers have begun."""
    counts: dict[str, int] = {}
    for file in notes.iterdir():
        node = file.name.partition(".")[0]
        counts[node] = counts.get(node, 0) + len(file.read_text().splitlines())
    return counts


def wait_until(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


# a cluster of several machines


@pytest.mark.slow
def test_a_machine_that_dies_changes_no_byte(
    cluster: Cluster, model: Path, whole: Path, tmp_path: Path, notes: Path
) -> None:
    node = cluster.add_node(num_cpus=1)
    process = driver(model, tmp_path / "out", notes, "--address", cluster.address, "--json")
    wait_until(lambda: len(begun(notes)) == 2 and min(begun(notes).values()) >= 10, process)
    workers = [int(file.name.partition(".")[2]) for file in notes.iterdir() if file.name.startswith(node.node_id)]
    raylet = node.all_processes["raylet"][0].process
    raylet.kill()
    raylet.wait()
    at_death = begun(notes)
    assert finished(tmp_path / "out") < sum(at_death.values()) < 221  # there was work left, also in its hands
    wait_until(lambda: not alive(workers), process)
    output, errors = process.communicate()
    cluster.remove_node(node, allow_graceful=False)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert json.loads(output)["bytes"]["resumed"] == 0  # stdout is JSON alone
    assert same_files(tmp_path / "out", whole)
    print(f"begun when it died: {list(at_death.values())}, in the end: {list(begun(notes).values())}")


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on(
    cluster: Cluster, model: Path, whole: Path, tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun at an address, ended at `auto`."""
    out = tmp_path / "out"
    process = driver(model, out, notes, "--address", cluster.address)
    wait_until(lambda: finished(out) >= 20, process)
    process.kill()
    process.communicate()
    units = finished(out)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    again = driver(model, out, notes, "--address", "auto", "--json", "--quiet", seconds=0.0)
    output, errors = again.communicate()
    assert again.returncode == 0 and errors == "", errors
    work = json.loads(output)["bytes"]
    assert work["resumed"] > 0 and units >= 20 and same_files(out, whole)
    assert work["resumed"] + work["quantized"] + work["copied"] == sum(
        tensor.nbytes for (file,) in [list(out.glob("*.safetensors"))] for tensor in load_file(file).values()
    )


@pytest.mark.slow
def test_errors_of_a_worker_are_those_of_local_work(cluster: Cluster, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][7, 3] = torch.nan
    save_file(tensors, file)
    caught = []
    for workers in (Workers(jobs=1), Workers(WorkerKind.RAY, address=cluster.address)):
        with pytest.raises(FxquantError) as error:
            compile(
                model, CompileOptions(policy=POLICY, out=tmp_path / "out", verify=False, export=False, workers=workers)
            )
        caught.append(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    local, remote = caught
    assert type(local) is type(remote) is FxquantError and not ray.is_initialized()
    assert (local.place, local.fact, local.remedy) == (remote.place, remote.fact, remote.remedy)
    assert "experts.2.up_proj" in local.place


@pytest.mark.slow
def test_a_connection_that_is_there_is_used_and_stays(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    """And what stops the work comes back as that, so that finished units are kept."""
    checkpoint, name = open_checkpoint(model), "model.norm.weight"
    spec = TensorSpec(torch.bfloat16, checkpoint.tensors[name].shape, "FLOAT")
    place = Place("weights", 0, checkpoint.tensors[name].nbytes)
    job = FillJob(tmp_path / "gone", CheckpointProducer(checkpoint, stamp_files(checkpoint_files(checkpoint))))
    units = [Unit(name, None, StoredTensor(name, spec, name), {"": place})]
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        with pytest.raises(StoppedError, match="gone.*cannot be opened: No such file"):
            list(Workers(WorkerKind.RAY).fill(job, units))
        assert ray.is_initialized()
    finally:
        ray.shutdown()


# a cluster of this machine, started and ended with the work


@pytest.mark.slow
@pytest.mark.parametrize("imported", [False, True], ids=["later", "before"])
def test_environment_and_ray_are_as_before(imported: bool, tmp_path: Path) -> None:
    """The cluster has a token, also where Ray was imported before; a later one of the caller's starts as ever."""
    model = write_checkpoint(tmp_path / "model")
    asked = [sys.executable, TOKENS, str(model), str(tmp_path / "out"), *(["imported"] if imported else [])]
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    places = os.environ | {"HOME": str(tmp_path), "XDG_CACHE_HOME": cache}  # Ray writes a token of its own there
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300, check=False, env=places)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["64", "None", "None", "42"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_cluster_and_keeps_what_is_finished(
    number: signal.Signals, model: Path, whole: Path, tmp_path: Path, notes: Path, cluster: Cluster, fxquant_: Fxquant
) -> None:
    """What is finished is taken up by the other cluster, which is there already."""
    out = tmp_path / "out"
    process = driver(model, out, notes, "--jobs", "2", "--quiet")
    wait_until(lambda: finished(out) >= 10, process)
    started = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, number)
    output, errors = process.communicate()
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert process.returncode == 128 + number and output == "" and len(started) > 3, errors
    said = rf"{word}\. Nothing was left at \S+\. Finished work is kept in \S+: the same command resumes it\."
    assert re.fullmatch(said, " ".join(errors.split()))
    wait_until(lambda: not alive(started))
    assert not out.exists() and finished(out) >= 10
    options = ("-p", POLICY, "--workers", "ray", "--address", cluster.address, "--no-verify", "--no-export")
    code, output, errors = fxquant_("compile", model, "-o", out, *options, "--json", "--quiet")
    assert (code, errors) == (0, ""), errors
    assert json.loads(output)["bytes"]["resumed"] > 0
    assert same_files(out, whole)


def test_a_signal_while_ray_starts_is_ours() -> None:
    """Ray's init begins by listening to SIGTERM itself."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a command: tests above have let Ray listen
    with pytest.raises(KeyboardInterrupt), Signals() as own, ray_cluster._same_signals():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert own.received == signal.SIGTERM


# what is refused


def refused(model: Path, address: str | None) -> FxquantError:
    command = ["compile", str(model), "-o", str(model.parent / "out"), "--workers", "ray"]
    command += [] if address is None else ["--address", address]
    with pytest.raises(FxquantError) as caught:
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (model.parent / "out.partial").exists()
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    return caught.value


def test_where_nothing_answers_is_told(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    error = refused(model, f"127.0.0.1:{port}")
    assert error.fact == "no Ray cluster answers: Connection refused." and "ray start --head" in error.remedy
    for address in ("ray://head:10001", "head", "head:port"):
        assert refused(model, address).fact == "not the address of a Ray cluster."


@pytest.mark.slow
def test_something_else_that_answers_is_told_in_bounded_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_SECONDS", 4)
    with socket.create_server(("127.0.0.1", 0)) as server:
        error = refused(model, f"127.0.0.1:{server.getsockname()[1]}")
    assert error.fact == "no Ray cluster answers in 4 seconds."


def test_ray_that_is_not_installed_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    error = refused(model, None)
    assert error.fact == "Ray is not installed." and error.remedy == "pip install 'fxquant[ray]'"


def test_workers_of_another_version_do_not_work() -> None:
    with pytest.raises(StoppedError, match=r"has fxquant 0\.1\.0 with .* runs fxquant 0\.0\.1 with kernels 0\."):
        ray_cluster._fill_some([], ("0.0.1", 0), [])
