"""An output folder comes into being: everything in `<out>.partial`, then one rename."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fxquant
from fxquant.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.lowering.ascend.deployment import Deployment
from fxquant.lowering.ascend.exported import write_exported
from fxquant.lowering.ascend.writer import write_ascend
from fxquant.lowering.description import description, engine_config, index, write_json
from fxquant.lowering.engines import ENGINES, Engine
from fxquant.lowering.layout import FileLayout, plan_files, stored_tensors
from fxquant.lowering.manifest import FLOAT_GRAPH, GRAPH, LEDGER, MANIFEST, Manifest, file_digests, file_sizes, relative
from fxquant.lowering.onnx.writer import write_onnx
from fxquant.lowering.weights import Make, write_weights
from fxquant.program import Program
from fxquant.program_file import save_program
from fxquant.progress import Reporter
from fxquant.safetensors_file import read_header
from fxquant.targets import Target

COPIED_SUFFIXES = (".json", ".jinja", ".model")
COPIED = ("merges.txt", "vocab.txt")
OWN = ("fxquant_", "quant_model_description")


@dataclass(frozen=True)
class Contents:
    """All that an output folder is made of.

    checkpoint    the folder that float tensors and documents are copied from
    make          recipe and module → the module's tensors, by suffix
    float_graph   the graph before its rewrite, as text; ledger: where every tensor of the checkpoint went
    export        write the NPU graph as torch.export programs too
    source        MODEL as it was named, and `origin`: the checkpoint folder behind it
    """

    program: Program
    checkpoint: Checkpoint
    make: Make
    float_graph: str
    ledger: dict[str, Any]
    source: Path
    origin: Path
    policy: str
    target: Target
    max_shard_size: int
    tp: int = 1
    export: bool = True


@dataclass
class Output:
    """The folder, while it has its working name and after, its weight files, and what the NPU graph was made of."""

    folder: Path
    files: list[FileLayout]
    deployment: Deployment | None = None


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
def write_output(contents: Contents, out: Path, report: Reporter) -> Iterator[Output]:
    """Write everything, let the caller look at it, then give the folder its name; on any error nothing is left."""
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        engine = ENGINES[contents.target]
        stored = stored_tensors(contents.program, contents.checkpoint)
        files = plan_files(stored, contents.max_shard_size, engine)
        _check_space(partial, files)
        with report("quantize, write", sum(tensor.nbytes for tensor in stored), "bytes") as advance:
            write_weights(files, contents.checkpoint, contents.make, partial, advance)
        _write_documents(contents, files, engine, partial)
        deployed = _write_graph(contents, engine, files, partial, report)
        _write_manifest(contents, partial)
        output = Output(partial, files, deployed)
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


def _write_documents(contents: Contents, files: list[FileLayout], engine: Engine, folder: Path) -> None:
    program = contents.program
    for file in sorted(contents.checkpoint.folder.iterdir()):
        if file.is_file() and _is_copied(file):
            shutil.copyfile(file, folder / file.name)
    write_json(folder / engine.description, description(program, files, engine))
    write_json(folder / "config.json", engine_config(program, engine))
    write_json(folder / LEDGER, contents.ledger)
    if len(files) > 1 or engine.numbered:
        write_json(folder / engine.index, index(files))
    (folder / FLOAT_GRAPH).write_text(contents.float_graph, encoding="utf-8")


def _is_copied(file: Path) -> bool:
    """Tokenizer files and the like: neither the config, which is written anew, nor an index, nor our own files."""
    own = file.name == "config.json" or file.name.endswith(".index.json") or file.name.startswith(OWN)
    return not own and (file.suffix in COPIED_SUFFIXES or file.name in COPIED)


def _write_graph(
    contents: Contents, engine: Engine, files: list[FileLayout], folder: Path, report: Reporter
) -> Deployment | None:
    program = contents.program
    save_program(program, folder / GRAPH)
    if engine.npu_graph:
        deployed = write_ascend(program, folder)
        if contents.export:
            with report("export", 1, "graph") as advance:
                write_exported(deployed.program, folder)
                advance(1)
        return deployed
    tensors = {name: info for file in files for name, info in read_header(folder / file.name).items()}
    write_onnx(program, tensors, folder)
    return None


def _write_manifest(contents: Contents, folder: Path) -> None:
    manifest = Manifest(
        fxquant=fxquant.__version__,
        source=relative(contents.source, folder),
        checkpoint=relative(contents.origin, folder),
        policy=contents.policy,
        target=contents.target.value,
        tp=contents.tp,
        files=file_sizes(folder),
        blake2b=file_digests(folder),
    )
    write_json(folder / MANIFEST, manifest.model_dump())


def _rename(partial: Path, out: Path) -> None:
    old = out.with_name(out.name + ".replaced")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    if old.exists():
        shutil.rmtree(old)
