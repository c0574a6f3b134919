"""Without a manifest, ledger, float graph and exported graphs are made again: damage is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fxquant
from fxquant import CompileOptions
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.lowering.ascend.export.exported import DECODE, PREFILL
from fxquant.lowering.output_folder.manifest import FLOAT_GRAPH, GRAPH, LEDGER
from fxquant.program.program_file import load_program
from fxquant.verification import remade
from fxquant.verification.remade import OWN, Remade, check_remade


@pytest.fixture(scope="module")
def source(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    out = tmp_path_factory.mktemp("remade") / "out"
    return fxquant.compile(source, CompileOptions(policy="deepseek_w4a8_dynamic", out=out, verify=False)).out


@pytest.fixture
def out(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "out"))


def looked(out: Path, source: Path, exports: bool = False) -> Remade:
    return check_remade(out, load_program(out / GRAPH), open_checkpoint(source), exports)


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_sound_output_leaves_nothing(out: Path, source: Path) -> None:
    remade = looked(out, source)
    assert [check.misses for check in remade.checks] == [[], []] and remade.unread == {FLOAT_GRAPH: "", LEDGER: ""}


@pytest.mark.parametrize("name", [FLOAT_GRAPH, LEDGER])
@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"\xff", None])
def test_another_document_is_named(name: str, content: bytes | None, out: Path, source: Path) -> None:
    """None: the same with a space more."""
    (out / name).write_bytes((out / name).read_bytes() + b" " if content is None else content)
    misses = [miss for check in looked(out, source).checks for miss in check.misses]
    assert len(misses) == 1 and name in misses[0]


def test_a_ledger_that_says_otherwise_is_named(out: Path, source: Path) -> None:
    path = out / LEDGER
    path.write_text(path.read_text().replace("kept", "left out", 1))
    assert [miss for check in looked(out, source).checks for miss in check.misses]


def test_a_float_graph_of_its_own_is_listed(out: Path, source: Path) -> None:
    """Another epsilon: a model.py may have said so, and none is run."""
    text = (out / FLOAT_GRAPH).read_text()
    assert "1e-06" in text
    (out / FLOAT_GRAPH).write_text(text.replace("1e-06", "2e-06", 1))
    remade = looked(out, source)
    assert not [miss for check in remade.checks for miss in check.misses] and remade.unread[FLOAT_GRAPH] == OWN


def test_exported_graphs_are_made_again(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(program: object, folder: Path) -> None:
        for name in (PREFILL, DECODE):
            (folder / name).write_bytes(name.encode())

    monkeypatch.setattr(remade, "write_exported", write)
    assert len(looked(out, source, exports=True).checks) == 2  # there are none
    (out / PREFILL).write_bytes(PREFILL.encode())
    (out / DECODE).write_bytes(b"other")
    result = looked(out, source, exports=True)
    assert [DECODE in miss for miss in result.checks[-1].misses] == [True]
    assert result.unread[PREFILL] == result.unread[DECODE] == ""


def test_verify_says_it(out: Path, source: Path) -> None:
    (out / "fxquant_manifest.json").unlink()
    (out / "notes.txt").write_text("mine")
    report = fxquant.verify(out, against=source)
    assert report.verdict == "verified" and report.unread["notes.txt"] == "all of it"
    assert not {FLOAT_GRAPH, LEDGER} & set(report.as_json()["unread"])
    (out / LEDGER).write_text("{}")
    report = fxquant.verify(out, against=source)
    assert report.verdict == "FAILED" and any(LEDGER in miss for check in report.checks for miss in check.misses)
