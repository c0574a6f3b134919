"""Output folder: writes weights, documents, graphs and manifest in a workspace, which is then renamed to the output."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxquant.calibration.calibration_file import CALIBRATION, Calibration
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.stamped_bytes import Stamps
from fxquant.engines.engine import Engine
from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.serving import RankLayout, Serving
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.kernels.version import KERNEL_VERSION
from fxquant.lowering.ascend.export.exported import write_exported
from fxquant.lowering.ascend.writer import write_ascend
from fxquant.lowering.deployment import Deployment
from fxquant.lowering.destination import Destination
from fxquant.lowering.onnx.description import Provenance
from fxquant.lowering.onnx.genai_config import genai_config
from fxquant.lowering.onnx.writer import write_onnx
from fxquant.lowering.output_folder.copies import GENAI_CONFIG, copied_files, left_out_code, write_copy
from fxquant.lowering.output_folder.description import description, engine_config, index, write_json
from fxquant.lowering.output_folder.layout import FileLayout, plan_files, stored_tensors
from fxquant.lowering.output_folder.manifest import (
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
from fxquant.lowering.output_folder.rotation_file import write_rotation
from fxquant.lowering.output_folder.serving_page import SERVING, serving_page
from fxquant.lowering.weights.digests import file_digest
from fxquant.lowering.weights.journal import Fingerprint, Journal
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
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program, save_program
from fxquant.progress import Reporter
from fxquant.storage.hashing import hash_bytes, hash_text
from fxquant.storage.safetensors import read_header
from fxquant.version import __version__

EXISTS = "Pass --force to replace it, or choose another -o."


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Everything that an output folder is made from.

    checkpoint    the folder that names, shapes and documents are taken from
    producer      makes the bytes of weights; `stamps`: the states of the files they are in
    sources       identities of the checkpoint's files for the manifest
    calibration   the calibration that static ranges were made from, if any
    float_graph   the graph before its rewrite, as text; ledger: where every tensor of the checkpoint went
    layout        ranks that it is checked for; `serving`: how SERVING.md says to serve it, None: no engine does
    export        also write the NPU graph as torch.export programs
    onnx          how an ONNX graph is written
    source        MODEL as the user named it, and `origin`: the checkpoint folder behind it
    reusable      later compiles may reuse units of the output
    foreign       others chose its integers: they follow from no policy
    documents     copied file of the checkpoint's folder → XXH3-128 that it must have, if known
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
    layout: RankLayout = RankLayout()
    serving: Serving | None = Serving()
    export: bool = True
    onnx: OnnxForm = OnnxForm()
    reusable: bool = True
    foreign: bool = False
    documents: Mapping[str, str] = field(default_factory=dict)

    @property
    def provenance(self) -> Provenance:
        """What an ONNX graph says that it came from."""
        return Provenance(self.policy, self.origin.resolve().name)

    def genai_config(self) -> dict[str, Any] | None:
        """The document for onnxruntime-genai, if it can run the graph."""
        taken = not ENGINES[self.target].npu_graph and self.onnx.cache is OnnxCache.HALVES
        return genai_config(self.program, self.checkpoint.folder) if taken else None

    def identity(self, out: Path) -> str:
        """Hash of everything that the documents of `out` are made from; weights have their own keys."""
        copied = {name: file_digest(file) for name, file in copied_files(self.checkpoint).items()}
        paths = [relative(self.source, out), relative(self.origin, out), self.provenance.source]
        options = [self.policy, self.target.value, str(self.layout), self.export, str(self.onnx), self.reusable]
        seen = None if self.calibration is None else vars(self.calibration.seen)
        sources = {name: file.model_dump() for name, file in self.sources.items()}
        page = serving_page(self.program, self.target, self.policy, self.serving)
        texts = [dump_program(self.program), self.float_graph, self.ledger, page, self.genai_config()]
        return hash_text(json.dumps([texts, sources, seen, options, paths, copied], sort_keys=True))


@dataclass(frozen=True)
class Work:
    """How an output is made: by which workers, reusing which earlier output, and whether unfinished work is discarded.

    replaced  `reuse` is the output that is replaced
    named     called after the final rename
    """

    workers: Workers = field(default_factory=Workers)
    reuse: Path | None = None
    restart: bool = False
    replaced: bool = False
    named: Callable[[], None] = lambda: None


@dataclass
class Output:
    """The folder (until the final rename, `files` of the work folder), its weight files, the origin of their bytes, and
    how the NPU graph was made; `notes`: messages for the user."""

    folder: Path
    files: Sequence[FileLayout]
    work: WorkReport
    deployment: Deployment | None = None
    notes: list[str] = field(default_factory=list)


@contextmanager
def write_output(contents: Contents, destination: Destination, work: Work, report: Reporter) -> Iterator[Output]:
    """Write everything, let the caller check it, then rename the folder to `destination.out`.

    Finished units of the same work, interrupted earlier, are resumed; after its final rename only the caller's check is
    left. A fault leaves nothing; see `open_workspace`.
    """
    plan = _plan(contents)
    fingerprint, identity = _fingerprint(contents, plan), contents.identity(destination.out)
    earlier = open_earlier(work.reuse, work.replaced) if work.reuse else None
    with open_workspace(destination, work.restart) as space:
        if space.named:
            yield _named(space, plan, fingerprint, identity)
            space.end(work.named)
            return
        journal = _journal(contents, plan, space, fingerprint)
        done = write_weights(plan, contents.producer, journal, space.folder, work.workers, earlier, report)
        deployed = _write_documents(contents, plan.files, space.folder, report)
        _write_manifest(contents, plan, journal, space)
        notes = destination.notes + (earlier.notes if earlier else []) + left_out_code(contents.checkpoint)
        output = Output(space.folder, plan.files, done, deployed, notes)
        yield output
        space.finish(journal, identity, work.named)
        journal.stream.close()
        output.folder = destination.named


def _plan(contents: Contents) -> WeightPlan:
    stored = stored_tensors(contents.program, contents.checkpoint)
    return plan_weights(plan_files(stored, contents.max_shard_size, ENGINES[contents.target]), contents.producer)


def _fingerprint(contents: Contents, plan: WeightPlan) -> Fingerprint:
    version, target = __version__, contents.target.value
    return fingerprint(plan, version, contents.policy, target, contents.stamps)


def _named(space: Workspace, plan: WeightPlan, fingerprint: Fingerprint, identity: str) -> Output:
    """The output of an earlier run that was already renamed. Raises FxquantError if this command makes another one."""
    destination = space.destination
    if not space.completed(fingerprint, identity):
        raise FxquantError(destination.named, "exists and is not empty.", EXISTS)
    note = f"{destination.named} was complete: files that an earlier run had left were removed"
    return Output(destination.named, plan.files, WorkReport(resumed=plan.nbytes), notes=[note])


def _journal(contents: Contents, plan: WeightPlan, space: Workspace, fingerprint: Fingerprint) -> Journal:
    """The journal of unfinished work if it is the same work, else a new one over reserved files."""
    journal = space.unfinished(fingerprint)
    if journal is not None:
        _clear_documents(plan, space.folder)
    else:
        check_space(plan.files, space.folder)
        reserve(plan.files, space.folder)  # before the journal: a kill in between leaves nothing to resume
    if contents.calibration is None:
        return journal or space.begin(fingerprint)
    contents.calibration.save(space.folder / CALIBRATION)
    return journal or space.begin(fingerprint | {"calibration": file_digest(space.folder / CALIBRATION)})


def _clear_documents(plan: WeightPlan, folder: Path) -> None:
    """Remove the documents, to be written again: the earlier run may have had other options."""
    weight_files = {file.name for file in plan.files} | {CALIBRATION}
    for name in set(file_sizes(folder)) - weight_files:
        (folder / name).unlink()


def _write_documents(
    contents: Contents, files: Sequence[FileLayout], folder: Path, report: Reporter
) -> Deployment | None:
    """Write everything except weights and manifest; return how the NPU graph was made, if there is one."""
    program, engine = contents.program, ENGINES[contents.target]
    for name, file in copied_files(contents.checkpoint).items():
        write_copy(file, folder / name, contents.documents.get(name))
    write_json(folder / engine.description, description(program, files, engine))
    write_json(folder / "config.json", engine_config(program, engine, contents.checkpoint.folder))
    write_json(folder / LEDGER, contents.ledger)
    page = serving_page(program, contents.target, contents.policy, contents.serving)
    (folder / SERVING).write_text(page, encoding="utf-8")
    if len(files) > 1 or engine.numbered:
        write_json(folder / engine.index, index(files))
    if program.stream:
        write_rotation(folder, program.stream)
    (folder / FLOAT_GRAPH).write_text(contents.float_graph, encoding="utf-8")
    return _write_graph(contents, engine, files, folder, report)


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
    write_onnx(program, tensors, folder, contents.onnx, contents.provenance)
    genai = contents.genai_config()
    if genai is not None:
        write_json(folder / GENAI_CONFIG, genai)
    return None


def _write_manifest(contents: Contents, plan: WeightPlan, journal: Journal, space: Workspace) -> None:
    folder = space.folder
    if contents.reusable:
        save_stamps(contents.stamps, folder)
    sizes, weights = file_sizes(folder), {file.name: hash_bytes(file.header) for file in plan.files}
    done = sorted(journal.done.values(), key=lambda filled: filled.name)  # workers finish in any order
    units = {
        filled.name: UnitRecord(key=plan.keys[filled.name], digests=dict(sorted(filled.digests.items())))
        for filled in done
    }
    manifest = Manifest(
        fxquant=__version__,
        kernels=KERNEL_VERSION,
        source=relative(contents.source, space.destination.out),
        checkpoint=relative(contents.origin, space.destination.out),
        policy=contents.policy,
        target=contents.target.value,
        tp=contents.layout.tp,
        ep=contents.layout.ep,
        graph_only=contents.serving is None,
        sources=contents.sources,
        files=sizes,
        digests={name: file_digest(folder / name) for name in sizes if name not in weights},
        weights=weights,
        units=units,
        foreign=contents.foreign,
    )
    write_json(folder / MANIFEST, manifest.model_dump(exclude=set() if contents.foreign else {"foreign"}))
