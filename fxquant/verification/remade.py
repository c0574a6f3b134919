"""Remade files: derived files of an output made again and compared, if no manifest has their digests."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.compilation.ledger import build_ledger, check_parameters
from fxquant.errors import FxquantError
from fxquant.frontend.source import open_source
from fxquant.inputs.json_file import read_bytes, read_text
from fxquant.inputs.limits import GRAPH_BYTES
from fxquant.lowering.ascend.deployment import deployment
from fxquant.lowering.ascend.export.exported import DECODE, PREFILL, write_exported
from fxquant.lowering.output_folder.description import document_text
from fxquant.lowering.output_folder.manifest import FLOAT_GRAPH, LEDGER
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program, load_program
from fxquant.verification.report import Check

EXPORTED = (PREFILL, DECODE)
OWN = "what it computes: it is not the checkpoint's own graph, and verify runs no model file to compare it"


@dataclass
class Remade:
    """`checks` of the files, and `unread`: file → the part of it that they do not look at; "" for none.

    published: no other float graph than the checkpoint's own was seen, which is the one that engines run.
    """

    checks: list[Check] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    published: bool = True


def check_remade(folder: Path, program: Program, source: Checkpoint | None, exports: bool) -> Remade:
    """Float graph and ledger against `source`, the checkpoint as it is; and, if `exports`, existing .pt2 files."""
    remade = Remade()
    if source is not None:
        _check_float_graph(remade, folder / FLOAT_GRAPH, source)
        _check_ledger(remade, folder / LEDGER, program, source)
    if exports:
        _check_exported(remade, folder, program)
    return remade


def _check_float_graph(remade: Remade, path: Path, source: Checkpoint) -> None:
    """A program over the source's tensors, in its written form; checked whole if it is the checkpoint's own graph."""
    check = Check("float graph", 1)
    remade.checks.append(check)
    try:
        text, program = read_text(path, GRAPH_BYTES), load_program(path)
        check_parameters(program, source)
    except FxquantError as error:
        check.expect(False, str(error))
        return
    check.expect(text == dump_program(program), f"{path.name}: its bytes differ from those written")
    remade.published = text == _traced(source)
    remade.unread[path.name] = "" if remade.published else OWN


def _traced(source: Checkpoint) -> str | None:
    """The float graph of the checkpoint's own model; None where there is none."""
    try:
        return dump_program(open_source(source.folder).program())
    except FxquantError:
        return None


def _check_ledger(remade: Remade, path: Path, program: Program, source: Checkpoint) -> None:
    check = Check("ledger == graph and source", 1)
    remade.checks.append(check)
    try:
        same = read_text(path, GRAPH_BYTES) == document_text(build_ledger(program, source).as_json())
        check.expect(same, f"{path.name}: not what follows from graph and source")
    except FxquantError as error:
        check.expect(False, f"{path.name}: {error.fact}")
    remade.unread[path.name] = ""


def _check_exported(remade: Remade, folder: Path, program: Program) -> None:
    """An output need not have them; those of another torch differ."""
    present = [name for name in EXPORTED if (folder / name).exists() or (folder / name).is_symlink()]
    if not present:
        return
    check = Check("exported graphs, made again", len(present))
    remade.checks.append(check)
    with tempfile.TemporaryDirectory() as place:
        write_exported(deployment(program).program, Path(place))
        for name in present:
            exported = (Path(place) / name).read_bytes()
            try:
                same = read_bytes(folder / name, len(exported)) == exported
            except FxquantError:
                same = False
            check.expect(same, f"{name}: not what torch {torch.__version__} exports from the graph")
            remade.unread[name] = ""
