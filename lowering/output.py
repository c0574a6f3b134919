"""An output folder comes into being: everything in `<out>.partial`, then one rename."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import fxquant
from fxquant.binding import Ledger
from fxquant.errors import FxquantError
from fxquant.frontend.source import Source
from fxquant.lowering.ascend.writer import write_ascend
from fxquant.lowering.description import DESCRIPTION, INDEX, description, engine_config, index, write_json
from fxquant.lowering.layout import FileLayout, plan_files, stored_tensors
from fxquant.lowering.manifest import FLOAT_GRAPH, GRAPH, LEDGER, MANIFEST, Manifest, file_sizes, relative
from fxquant.lowering.onnx.writer import write_onnx
from fxquant.lowering.weights import write_weights
from fxquant.policy import Policy
from fxquant.program import Program
from fxquant.program_file import save_program
from fxquant.progress import Reporter
from fxquant.safetensors_file import read_header
from fxquant.targets import Target

COPIED_SUFFIXES = (".json", ".jinja", ".model")
COPIED = ("merges.txt", "vocab.txt")
NOT_COPIED = ("config.json", "model.safetensors.index.json")


class PreparedProgram(Protocol):
    """What the front end hands over."""

    source: Source
    policy: Policy
    program: Program
    ledger: Ledger
    float_graph: str


class OutputOptions(Protocol):
    """What of the options concerns writing."""

    @property
    def target(self) -> Target: ...
    @property
    def max_shard_size(self) -> int: ...


@dataclass
class Output:
    """The folder, while it has its working name and after, and its weight files."""

    folder: Path
    files: list[FileLayout]


def check_out(out: Path, force: bool, source: Path) -> None:
    """Raise FxquantError unless `out` can be made: absent, empty, or with `force` an earlier output of fxquant."""
    if out.resolve() == source.resolve():
        raise FxquantError(out, "is the checkpoint itself.", "Choose another -o.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise FxquantError(out, "exists and is a file.", "Choose another -o.")
    if not (out / MANIFEST).is_file():
        raise FxquantError(out, f"is not empty and not an output of fxquant (no {MANIFEST}).", "Choose another -o.")
    if not force:
        raise FxquantError(out, "exists and is not empty.", "Pass --force to replace it, or choose another -o.")


@contextmanager
def write_output(prepared: PreparedProgram, options: OutputOptions, out: Path, report: Reporter) -> Iterator[Output]:
    """Write everything, let the caller look at it, then give the folder its name; on any error nothing is left."""
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        checkpoint = prepared.source.checkpoint
        files = plan_files(stored_tensors(prepared.program, checkpoint), options.max_shard_size)
        _check_space(partial, files)
        with report("quantize, write", sum(t.nbytes for file in files for t in file.tensors), "bytes") as advance:
            write_weights(files, checkpoint, partial, advance)
        _write_documents(prepared, files, partial)
        (partial / FLOAT_GRAPH).write_text(prepared.float_graph, encoding="utf-8")
        _write_graph(prepared.program, options.target, files, partial)
        _write_manifest(prepared, options.target, partial)
        output = Output(partial, files)
        yield output
        _rename(partial, out)
        output.folder = out
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_space(folder: Path, files: list[FileLayout]) -> None:
    needed, free = sum(file.nbytes for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise FxquantError(folder, f"{needed:,} bytes to write, {free:,} free.", "Free space or choose another -o.")


def _write_documents(prepared: PreparedProgram, files: list[FileLayout], folder: Path) -> None:
    program, source = prepared.program, prepared.source.checkpoint.folder
    for file in sorted(source.iterdir()):
        wanted = (
            (file.suffix in COPIED_SUFFIXES or file.name in COPIED)
            and file.name not in NOT_COPIED
            and not file.name.endswith(".index.json")
        )
        if wanted and file.is_file():
            shutil.copyfile(file, folder / file.name)
    write_json(folder / DESCRIPTION, description(program, files))
    write_json(folder / "config.json", engine_config(program))
    write_json(folder / LEDGER, prepared.ledger.as_json())
    if len(files) > 1:
        write_json(folder / INDEX, index(files))


def _write_graph(program: Program, target: Target, files: list[FileLayout], folder: Path) -> None:
    save_program(program, folder / GRAPH)
    if target is Target.ASCEND:
        write_ascend(program, folder)
    else:
        tensors = {name: info for file in files for name, info in read_header(folder / file.name).items()}
        write_onnx(program, tensors, folder)


def _write_manifest(prepared: PreparedProgram, target: Target, folder: Path) -> None:
    manifest = Manifest(
        fxquant=fxquant.__version__,
        source=relative(prepared.source.path, folder),
        checkpoint=relative(prepared.source.checkpoint.folder, folder),
        policy=prepared.policy.name,
        target=target.value,
        files=file_sizes(folder),
    )
    write_json(folder / MANIFEST, manifest.model_dump())


def _rename(partial: Path, out: Path) -> None:
    old = out.with_name(out.name + ".replaced")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    if old.exists():
        shutil.rmtree(old)
