"""Command-line options that `compile` shares with other verbs, and their parsers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.onnx_profile import DEFAULT as DEFAULT_PROFILE
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.engines.table import Target
from fxquant.errors import FxquantError
from fxquant.inputs.choices import choice
from fxquant.tools.completion import one_of, policies, targets

if TYPE_CHECKING:
    from fxquant.lowering.weights import Workers
    from fxquant.policy.policy import MtpMode


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A model.py, or a Hugging Face checkpoint folder.", show_default=False)
]
PolicyName = Annotated[
    str | None,
    typer.Option(
        "--policy",
        "-p",
        metavar="POLICY",
        help="Shipped policy or YAML file. [dim]default: the model file's, or deepseek_w4a8[/]",
        autocompletion=policies,
    ),
]
OutFolder = Annotated[
    Path | None,
    typer.Option("-o", "--out", metavar="FOLDER", help="Output folder. [dim]default: ./<name>-<policy>-<target>[/]"),
]
TargetName = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        metavar="TARGET",
        help=f"{_one_of(list(Target))}: see fxquant targets.",
        autocompletion=targets,
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option("--tp", metavar="N", help="Tensor-parallel ranks to check the output for.", min=1, max=4096),
]
ExpertRanks = Annotated[
    int | None,
    typer.Option(
        "--ep",
        metavar="N",
        help="Expert-parallel ranks, each with whole experts. [dim]default: experts are split over --tp[/]",
        min=1,
        max=4096,
    ),
]
Prepack = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Map weights that ONNX Runtime packed for this processor, kept in FOLDER; written there at first.",
        show_default=False,
    ),
]
GraphOnly = Annotated[
    bool,
    typer.Option(
        "--graph-only",
        help="For the graph beside the weights alone. Needed for a changed graph, which no engine runs.",
    ),
]
MtpName = Annotated[
    str | None,
    typer.Option(
        metavar="MODE",
        help="Multi-token prediction layers: none, float or quant. [dim]default: as the policy says[/]",
        autocompletion=one_of("none", "float", "quant"),
    ),
]
Mix = Annotated[
    bool | None,
    typer.Option(
        "--mix-shared/--no-mix-shared",
        help="Whether the engine will run shared experts as routed ones. [dim]default: as the policy needs it[/]",
    ),
]
OnnxProfileName = Annotated[
    str | None,
    typer.Option(
        metavar="PROFILE",
        help=f"Operators of an ONNX graph: {_one_of(list(OnnxProfile))}. [dim]default: {DEFAULT_PROFILE}[/]",
        autocompletion=one_of(*OnnxProfile),
    ),
]
OnnxAccuracyLevel = Annotated[
    int | None,
    typer.Option(
        "--onnx-accuracy-level",
        metavar="LEVEL",
        help="Activations of int4 products in profile ort: 0 float, 4 int8 by the block. [dim]default: 4[/]",
        autocompletion=one_of("0", "4"),
    ),
]
OnnxCacheName = Annotated[
    str | None,
    typer.Option(
        metavar="CACHE",
        help=f"What an ONNX graph keeps of the tokens so far: {_one_of(list(OnnxCache))}. "
        f"[dim]default: {OnnxCache.LATENT}[/]",
        autocompletion=one_of(*OnnxCache),
    ),
]
OnnxLastLogits = Annotated[
    bool,
    typer.Option(
        "--onnx-last-logits",
        help="Give an ONNX graph an input num_logits_to_keep: 1 for the logits of the last token alone, 0 for all.",
    ),
]
OnnxInline = Annotated[
    bool,
    typer.Option("--inline", help="Write plain nodes in an ONNX graph, in place of local functions."),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Calibration text (.txt, .json, .jsonl) or token ids. [dim]default: calibration.jsonl beside the model[/]",
    ),
]
SavedCalibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration", metavar="FILE", help="optional/calibration.safetensors of an earlier output, instead of text."
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs", "-j", metavar="N", help="Number of workers. [dim]default: one per core[/]", min=1, show_default=False
    ),
]
WorkerName = Annotated[
    str,
    typer.Option(
        "--workers",
        metavar="KIND",
        help="Where weights are quantized: local threads, or a Ray cluster with shared storage (ray).",
        autocompletion=one_of("local", "ray"),
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Address of the Ray cluster: auto or HOST:PORT. [dim]default: start one on this machine[/]",
    ),
]
Reuse = Annotated[
    Path | None, typer.Option("--reuse", metavar="OLD_OUT", help="Reuse unchanged tensors from an earlier output.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Discard unfinished work instead of resuming it.")]
CheckpointFolder = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Checkpoint of a model.py, in place of the one that it names.")
]
TraceTimeout = Annotated[
    float, typer.Option(metavar="SECONDS", help="Maximum time for a model.py to import, build and trace.", min=0.1)
]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier output; unchanged tensors are reused.")]
ShardSize = Annotated[
    str,
    typer.Option(
        metavar="SIZE", help="Maximum size of a weight file, such as 500MB, 4GB (powers of 1000) or 4GiB (of 1024)."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="Device that runs the model during calibration: cpu, cuda or npu.",
        autocompletion=one_of("cpu", "cuda", "npu"),
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Silent = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only, and the report with --json.")]
Export = Annotated[
    bool, typer.Option("--export/--no-export", help="Also write the NPU graph as torch.export (.pt2) files.")
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Check the output against the source before it gets its name.")
]


def parse_target(name: str) -> Target:
    """The target of that name."""
    return choice("--target", name, Target)


def parse_profile(name: str | None) -> OnnxProfile | None:
    """The ONNX profile of that name."""
    return None if name is None else choice("--onnx-profile", name, OnnxProfile)


def parse_cache(name: str | None) -> OnnxCache | None:
    """The ONNX cache of that name."""
    return None if name is None else choice("--onnx-cache", name, OnnxCache)


def parse_workers(kind: str, jobs: int | None, address: str | None) -> "Workers":
    """`jobs` workers of that kind, by default one per core."""
    from fxquant.lowering.weights import WorkerKind, Workers
    from fxquant.lowering.weights.work import cores

    worker_kind = choice("--workers", kind, WorkerKind)
    if address is not None and kind != WorkerKind.RAY:
        raise FxquantError(f"--address {address}", "applies only to a Ray cluster.", "Pass --workers ray as well.")
    if address is not None and jobs is not None:
        fact = "sets how many workers start on this machine; a cluster has one per core."
        raise FxquantError(f"--jobs {jobs}", fact, "Leave out --jobs or --address.")
    return Workers(worker_kind, jobs or cores(), address)


def parse_mtp(name: str | None) -> "MtpMode | None":
    """The mode of that name."""
    from fxquant.policy.policy import MtpMode

    return None if name is None else choice("--mtp", name, MtpMode)


def parse_size(text: str) -> int:
    """Bytes of "4GiB", "500MB" or "1000000"."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    number = text.rstrip("kKmMgGiIbB ")
    unit = text[len(number) :].strip().upper()
    try:
        value = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):  # no number, no unit, infinite
        value = 0
    if value <= 0:
        raise FxquantError(f"--max-shard-size {text}", "not a size.", "Write 4GiB, 500MB or a number of bytes.")
    return value
