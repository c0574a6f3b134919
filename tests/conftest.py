"""Fixtures: tiny checkpoints, written once a session."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import collected_later
import pytest
import torch
from commands import Fxquant, in_process
from forked_child import forked_children
from hypothesis import settings
from kept import Kept
from measured import Measured
from published_style import style_published
from remembered import computed_once, traced_once
from rewrites import Rewritten, rewrite
from tiny import write_checkpoint

from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.frontend import child
from fxquant.lowering.ascend.export.exported import write_exported
from fxquant.planning import host_benchmark
from fxquant.planning import plan as planning
from fxquant.planning.host_benchmark import Measuring
from fxquant.processes.command import run_to_end

pytest_plugins = ["cpu_budget", "dear_first"]

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
"""At these sizes threads only wait for each other, for seconds where the machine is busy; in commands too."""

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""Where the tests run in the background of a shell, or by nohup, these are ignored, and by every process they start."""

assert collected_later and not gc.isenabled()
"""Until all tests are collected: what imports leave behind stays, and would be looked through again and again."""

YOUNG = 20_000
"""New objects after which garbage is looked for; with the 700 of Python it is a twentieth of the time of a compile."""

settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """Collect what tests leave, and that alone; seldom, since graphs are made of thousands of objects that stay."""
    gc.freeze()
    gc.set_threshold(YOUNG, 20, 20)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def without_exports() -> Iterator[None]:
    """The .pt2 files cost seconds a compile; a test that wants them asks for `with_exports`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxquant.lowering.output.write_exported", lambda program, folder: None)
        yield


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """What all processes of this run share."""
    folder = tmp_path_factory.getbasetemp()
    return Kept((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "kept")


@pytest.fixture(scope="session", autouse=True)
def equal_work_done_once(kept: Kept) -> Iterator[None]:
    """Commands take traces, emitted texts and reference codes of equal arguments from a memory, see remembered.py."""
    with traced_once(), computed_once(kept):
        yield


@pytest.fixture(scope="session", autouse=True)
def model_files_in_forks() -> Iterator[None]:
    """A model.py is traced in a fork of this process; a test that wants a process of its own asks for `own_process`."""
    with forked_children():
        yield


@pytest.fixture(scope="session", autouse=True)
def style_is_published() -> Iterator[None]:
    """The classes of deepseek_style.py are recognised as DeepSeek's own are."""
    with style_published():
        yield


@pytest.fixture(scope="session", autouse=True)
def machine_is_known() -> Iterator[None]:
    """`plan` in this process measures nothing; a test whose subject is that asks for `measured_machine`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (host_benchmark, planning):
            patch.setattr(module, "Measuring", Measured)
        yield


@pytest.fixture
def measured_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` measures this machine."""
    for module in (host_benchmark, planning):
        monkeypatch.setattr(module, "Measuring", Measuring)


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model.py is traced in a process that is started, as users' are."""
    monkeypatch.setattr(child, "run_to_end", run_to_end)


@pytest.fixture
def with_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile` writes the .pt2 files in this test."""
    monkeypatch.setattr("fxquant.lowering.output.write_exported", write_exported)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder(fp8=True, q_lora_rank=None)`: the folder of such a checkpoint, see tiny.py. Do not write to it."""
    written: dict[str, Path] = {}

    def folder(**options: Any) -> Path:
        key = repr(sorted(options.items(), key=str))
        if key not in written:
            written[key] = write_checkpoint(tmp_path_factory.mktemp("tiny"), **options)
        return written[key]

    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Callable[..., Path]) -> Callable[..., Checkpoint]:
    """As `tiny_folder`, opened."""
    return lambda **options: open_checkpoint(tiny_folder(**options))


@pytest.fixture(scope="session")
def checkpoint(tiny: Callable[..., Checkpoint]) -> Checkpoint:
    """The tiny model as it comes."""
    return tiny()


@pytest.fixture(scope="session")
def under(checkpoint: Checkpoint) -> Callable[[str], Rewritten]:
    """`under("deepseek_w8a8")`: the tiny model rewritten, once a policy."""
    done: dict[str, Rewritten] = {}

    def get(policy: str) -> Rewritten:
        if policy not in done:
            done[policy] = rewrite(checkpoint, policy)
        return done[policy]

    return get


@pytest.fixture
def fxquant_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fxquant:
    """`fxquant_("show", folder)`, see commands.py."""
    return in_process(monkeypatch, capsys)
