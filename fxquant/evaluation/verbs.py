"""Evaluation verbs: evaluate, sensitivity and engine perplexity of a compiled folder; compare of policies."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fxquant.calibration.calibration_file import CALIBRATION, load_calibration
from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.compilation.ledger import check_parameters
from fxquant.compilation.options import CompileOptions
from fxquant.compilation.prepare import open_model, prepare, transformed_checkpoint
from fxquant.engines.documents import group_size
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.evaluation.divergence import Evaluation, evaluate_programs
from fxquant.evaluation.sensitivity import measure_sensitivity
from fxquant.evaluation.sensitivity_report import Sensitivity
from fxquant.frontend.source import open_source
from fxquant.lowering.output_folder.layout import stored_tensors
from fxquant.lowering.output_folder.manifest import FLOAT_GRAPH, GRAPH, read_manifest
from fxquant.passes.base import choices
from fxquant.passes.pair_smoothing import restore_biases
from fxquant.policy.policy import load_policy
from fxquant.program.program import Program
from fxquant.program.program_file import load_program
from fxquant.progress import Reporter, silent, within
from fxquant.runtime.device import open_device
from fxquant.runtime.weight_providers import Cached, Read, RecipeWeights
from fxquant.text.load import load_batches

COMPARE_CACHE = 1 << 28
"""Bytes of quantized weights that `compare` keeps for each policy between chunks of text."""


class Compared(NamedTuple):
    """A policy's evaluation, bytes of its weights, and what it left open, as the target decided it."""

    evaluation: Evaluation
    nbytes: int
    choices: list[str]


def open_output(folder: Path) -> tuple[Program, Read]:
    """The rewritten graph of an output folder and its weights."""
    from fxquant.lowering.output_folder.weight_files import WeightFiles
    from fxquant.verification.weight_checks import check_stored

    read_manifest(folder)
    program = load_program(folder / GRAPH)
    files = WeightFiles(folder, program)
    check_stored(program, files)
    return program, Cached(files.read)


def evaluate(
    out: str | Path,
    text: str | Path,
    against: str | Path | None = None,
    samples: int = 64,
    seq_len: int = 256,
    report: Reporter = silent,
) -> Evaluation:
    """Perplexity of the float model and of the rewritten graph of `out`, and the KL divergence between them.

    Without `against` the float graph is the one stored in `out`, on the checkpoint that the manifest names: no code
    of a model file runs.
    """
    program, checkpoint = _original(Path(out), against)
    batches = load_batches(Path(text), checkpoint, samples, seq_len)
    stage = within(Path(text).name, report)
    return evaluate_programs((program, Cached(checkpoint.read)), [open_output(Path(out))], batches, stage)[0]


def sensitivity(
    out: str | Path,
    text: str | Path,
    against: str | Path | None = None,
    samples: int = 16,
    seq_len: int = 256,
    report: Reporter = silent,
) -> Sensitivity:
    """The cost of each quantized module of `out` alone: the SQNR of its output, and the KL divergence of the model.

    The integers are those of the weight files, the float model is that of `evaluate`, smoothed if `out` is.
    """
    program, checkpoint = _original(Path(out), against)
    if (Path(out) / CALIBRATION).is_file():
        checkpoint = transformed_checkpoint(checkpoint, load_calibration(Path(out) / CALIBRATION))
        restore_biases(program, checkpoint.transforms.tensors)
    batches = load_batches(Path(text), checkpoint, samples, seq_len)
    return measure_sensitivity((program, Cached(checkpoint.read)), open_output(Path(out)), batches, report)


def _original(folder: Path, against: str | Path | None) -> tuple[Program, Checkpoint]:
    """The float graph and the checkpoint that an output is compared with."""
    manifest = read_manifest(folder)
    if against is None:
        program, checkpoint = load_program(folder / FLOAT_GRAPH), open_checkpoint(manifest.checkpoint_path(folder))
        check_parameters(program, checkpoint)
        return program, checkpoint
    source = open_source(Path(against))
    return source.program(), source.checkpoint


def engine_perplexities(
    out: str | Path, text: str | Path, samples: int = 64, seq_len: int = 256, report: Reporter = silent
) -> dict[str, float]:
    """Perplexity of `out` as its engine computes it: "<reader>, exact" with the formats' own arithmetic, and
    "<reader>, device" with the rounding of the NPU's kernels. Raises FxquantError if no engine reads `out`."""
    from fxquant.engine_readers import Arithmetic
    from fxquant.evaluation.engine_perplexity import reader_perplexity

    folder = Path(out)
    manifest, (program, read) = read_manifest(folder), open_output(folder)
    engine = ENGINES[Target(manifest.target)]
    reader = engine.read(folder, manifest.layout, group_size(program))
    if reader is None:
        raise FxquantError(folder, f"target {manifest.target} has no engine to emulate.", "Leave out --as-engine.")
    batches = load_batches(Path(text), Checkpoint(folder, program.config, {}), samples, seq_len)
    ways = {"exact": Arithmetic.EXACT, "device": Arithmetic.KERNEL}
    return {
        f"{reader.name}, {way}": reader_perplexity(program, reader, read, batches, arithmetic, report)
        for way, arithmetic in ways.items()
    }


def compare(
    model: str | Path,
    policies: list[str],
    text: str | Path,
    options: CompileOptions | None = None,
    samples: int = 64,
    seq_len: int = 256,
    report: Reporter = silent,
    targets: Sequence[Target] = (),
) -> dict[str, Compared]:
    """Each policy for each of `targets`, or for that of `options`. Nothing is written; weights are made on the fly.

    Keys are policies, or `POLICY for TARGET` where there are several targets.
    """
    options = options or CompileOptions()
    forms = [(name, target) for name in policies for target in targets or (options.target,)]
    names = [f"{name} for {target}" if len(targets) > 1 else name for name, target in forms]
    open_device(options.device)
    source = open_model(model, options, report)
    batches = load_batches(Path(text), source.checkpoint, samples, seq_len)
    original = (source.program(), Cached(source.checkpoint.read))
    prepared = [
        prepare(source, load_policy(policy), replace(options, target=target), within(name, report), for_engine=False)
        for name, (policy, target) in zip(names, forms, strict=True)
    ]
    sizes = [
        sum(tensor.nbytes for tensor in stored_tensors(candidate.program, candidate.checkpoint))
        for candidate in prepared
    ]
    quantized = [
        (
            candidate.program,
            Cached(RecipeWeights(candidate.program, candidate.checkpoint, candidate.solved), COMPARE_CACHE),
        )
        for candidate in prepared
    ]
    results = evaluate_programs(original, quantized, batches, report, names)
    decided = [choices(candidate.passes) for candidate in prepared]
    return dict(zip(names, map(Compared, results, sizes, decided), strict=True))
