"""An output folder comes into being: weights, documents, graphs and manifest, in a workspace that becomes it."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fxquant
from fxquant.calibration import CALIBRATION, Calibration
from fxquant.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.hashing import hash_bytes
from fxquant.kernels.version import KERNEL_VERSION
from fxquant.lowering.ascend.deployment import Deployment
from fxquant.lowering.ascend.exported import write_exported
from fxquant.lowering.ascend.writer import write_ascend
from fxquant.lowering.description import description, engine_config, index, write_json
from fxquant.lowering.engines import ENGINES, Engine
from fxquant.lowering.layout import FileLayout, plan_files, stored_tensors
from fxquant.lowering.manifest import (
    FLOAT_GRAPH,
    GRAPH,
    LEDGER,
    MANIFEST,
    Manifest,
    SourceFile,
    UnitRecord,
    file_sizes,
    relative,
)
from fxquant.lowering.onnx.writer import write_onnx
from fxquant.lowering.weights.digests import file_digest
from fxquant.lowering.weights.journal import Journal
from fxquant.lowering.weights.producer import Producer
from fxquant.lowering.weights.reserve import check_space, reserve
from fxquant.lowering.weights.reuse import open_earlier, save_stamps
from fxquant.lowering.weights.work import (
    WeightPlan,
    Workers,
    WorkReport,
    fingerprint,
    plan_weights,
    write_weights,
)
from fxquant.lowering.workspace import Workspace, open_workspace
from fxquant.program import Program
from fxquant.program_file import save_program
from fxquant.progress import Reporter
from fxquant.safetensors_file import read_header
from fxquant.source_reader import Stamps
from fxquant.targets import Target

COPIED_SUFFIXES = (".json", ".jinja", ".model")
COPIED = ("merges.txt", "vocab.txt")
OWN = ("fxquant_", "quant_model_description")


@dataclass(frozen=True)
class Contents:
    """All that an output folder is made of.

    checkpoint    the folder that names, shapes and documents are taken from
    producer      where the bytes of weights come from; `stamps`: the states of the files they are in
    sources       what identifies the checkpoint's files in the manifest
    calibration   what static ranges were made of, if any
    float_graph   the graph before its rewrite, as text; ledger: where every tensor of the checkpoint went
    export        write the NPU graph as torch.export programs too
    source        MODEL as it was named, and `origin`: the checkpoint folder behind it
    reusable      later compiles may take units from the output
    """

    program: Program
    checkpoint: Checkpoint
    producer: Producer
    stamps: Stamps
    sources: dict[str, SourceFile]
    calibration: Calibration | None
    float_graph: str
    ledger: dict[str, Any]
    source: Path
    origin: Path
    policy: str
    target: Target
    max_shard_size: int
    tp: int = 1
    export: bool = True
    reusable: bool = True


@dataclass(frozen=True)
class Work:
    """How an output is made: by whom, with what of an earlier output, and whether unfinished work is discarded."""

    workers: Workers = field(default_factory=Workers)
    reuse: Path | None = None
    restart: bool = False


@dataclass
class Output:
    """The folder, while it has its working name and after, its weight files, how their bytes came there, and what the
    NPU graph was made of."""

    folder: Path
    files: Sequence[FileLayout]
    work: WorkReport
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
def write_output(contents: Contents, out: Path, work: Work, report: Reporter) -> Iterator[Output]:
    """Write everything, let the caller look at it, then give the folder its name.

    What was finished when the same work was killed is gone on with. A fault leaves nothing; see `open_workspace`.
    """
    engine = ENGINES[contents.target]
    stored = stored_tensors(contents.program, contents.checkpoint)
    plan = plan_weights(plan_files(stored, contents.max_shard_size, engine), contents.producer)
    earlier = open_earlier(work.reuse) if work.reuse else None
    with open_workspace(out, work.restart) as space:
        journal = _journal(contents, plan, space)
        done = write_weights(plan, contents.producer, journal, space.folder, work.workers, earlier, report)
        journal.stream.close()
        _write_documents(contents, plan.files, engine, space.folder)
        deployed = _write_graph(contents, engine, plan.files, space.folder, report)
        _write_manifest(contents, plan, journal, space)
        output = Output(space.folder, plan.files, done, deployed)
        yield output
        space.finish()
        output.folder = out


def _journal(contents: Contents, plan: WeightPlan, space: Workspace) -> Journal:
    """Of unfinished work that was this work, or a new one over reserved files."""
    version, target = fxquant.__version__, contents.target.value
    print_ = fingerprint(plan, version, contents.policy, target, contents.stamps)
    journal = space.unfinished(print_)
    if journal is not None:
        _clear_documents(plan, space.folder)
    else:
        check_space(plan.files, space.folder)
        reserve(plan.files, space.folder)
    if contents.calibration is not None:
        contents.calibration.save(space.folder / CALIBRATION)
    return journal or space.begin(print_)


def _clear_documents(plan: WeightPlan, folder: Path) -> None:
    """They are written anew: the earlier run may have been asked for others."""
    kept = {file.name for file in plan.files} | {CALIBRATION}
    for name in set(file_sizes(folder)) - kept:
        (folder / name).unlink()


def _write_documents(contents: Contents, files: Sequence[FileLayout], engine: Engine, folder: Path) -> None:
    program = contents.program
    for file in copied_files(contents.checkpoint.folder):
        shutil.copyfile(file, folder / file.name)
    write_json(folder / engine.description, description(program, files, engine))
    write_json(folder / "config.json", engine_config(program, engine))
    write_json(folder / LEDGER, contents.ledger)
    if len(files) > 1 or engine.numbered:
        write_json(folder / engine.index, index(files))
    (folder / FLOAT_GRAPH).write_text(contents.float_graph, encoding="utf-8")


def copied_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder that an output has a copy of."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and _is_copied(file)]


def _is_copied(file: Path) -> bool:
    """Tokenizer files and the like: neither the config, which is written anew, nor an index, nor our own files."""
    own = file.name == "config.json" or file.name.endswith(".index.json") or file.name.startswith(OWN)
    return not own and (file.suffix in COPIED_SUFFIXES or file.name in COPIED)


def _write_graph(
    contents: Contents, engine: Engine, files: Sequence[FileLayout], folder: Path, report: Reporter
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


def _write_manifest(contents: Contents, plan: WeightPlan, journal: Journal, space: Workspace) -> None:
    folder = space.folder
    if contents.reusable:
        save_stamps(contents.stamps, folder)
    sizes, weights = file_sizes(folder), {file.name: hash_bytes(file.header) for file in plan.files}
    done = sorted(journal.done.values(), key=lambda filled: filled.name)
    units = {one.name: UnitRecord(key=plan.keys[one.name], digests=dict(sorted(one.digests.items()))) for one in done}
    manifest = Manifest(
        fxquant=fxquant.__version__,
        kernels=KERNEL_VERSION,
        source=relative(contents.source, space.out),
        checkpoint=relative(contents.origin, space.out),
        policy=contents.policy,
        target=contents.target.value,
        tp=contents.tp,
        sources=contents.sources,
        files=sizes,
        digests={name: file_digest(folder / name) for name in sizes if name not in weights},
        weights=weights,
        units=units,
    )
    write_json(folder / MANIFEST, manifest.model_dump())
