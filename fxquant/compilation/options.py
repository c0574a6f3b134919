"""Compile options, one class per stage: a stage takes those that it needs, `CompileOptions` has all of them."""

from dataclasses import dataclass, field
from pathlib import Path

from fxquant.compilation.onnx_options import OnnxOptions
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.table import DEFAULT, Target
from fxquant.errors import FxquantError
from fxquant.frontend.source import TRACE_TIMEOUT
from fxquant.inputs.choices import choice
from fxquant.lowering.destination import Input
from fxquant.lowering.output_folder.layout import MAX_SHARD_SIZE
from fxquant.lowering.output_folder.manifest import MANIFEST
from fxquant.lowering.weights.work import Workers
from fxquant.policy.policy import MtpMode

DEFAULT_POLICY = "deepseek_w4a8"
REUSE = "--reuse"
Name = str | Path | None


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How MODEL is opened.

    checkpoint     overrides the folder that a model.py names
    trace_timeout  seconds that a model.py may take to import, build and trace
    """

    checkpoint: Name = None
    trace_timeout: float = TRACE_TIMEOUT


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Text to run through the float model, or the calibration of an earlier output.

    calib        calibration text or token ids; None: the file beside the model, if any
    calibration  calibration.safetensors of an output, in place of text
    samples      documents to calibrate on, each of at most `seq_len` tokens
    batch_size   documents per calibration batch; `batch_mean` averages over such batches
    device       where calibration runs the model: cpu, cuda or npu
    """

    calib: Name = None
    calibration: Name = None
    samples: int = 32
    seq_len: int = 256
    batch_size: int = 1
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """Where weights are quantized, and what is reused.

    workers  how many workers fill the weight files, and where
    reuse    earlier output to reuse unchanged tensors from; None: with `force` the one that is replaced
    restart  discard unfinished work in `<out>.partial`
    """

    workers: Workers = field(default_factory=Workers)
    reuse: Name = None
    restart: bool = False


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written.

    out             output folder; None: `./<name>-<policy>-<target>`
    target          the engine that will load it
    graph_only      for the graph beside the weights alone: no engine is promised, which a changed graph needs
    max_shard_size  bytes of tensor data a weight file may hold
    export          also write the NPU graph as torch.export programs (.pt2)
    force           replace an earlier output of fxquant at `out`
    verify          check it against the source before it gets its name
    """

    out: Name = None
    target: Target = DEFAULT
    graph_only: bool = False
    max_shard_size: int = MAX_SHARD_SIZE
    export: bool = True
    force: bool = False
    verify: bool = True


@dataclass(frozen=True, kw_only=True)
class CompileOptions(SourceOptions, CalibrationOptions, WorkOptions, OutputOptions, OnnxOptions):
    """What `compile` takes besides the model.

    policy    name of a shipped policy or path of a YAML file; None: the model file's POLICY or deepseek_w4a8
    tp        tensor-parallel ranks that the output will be served on; None: not known, checked for one
    ep        expert-parallel ranks, each with whole experts; None or 1: every expert is split over `tp` ranks
    mtp       multi-token prediction layers: none, float or quant; None: as the policy says
    mix       whether the engine will run shared experts as routed ones; None: as the policy needs it
    kv_cache  None or "float": int8 is refused
    """

    policy: str | None = None
    tp: int | None = None
    ep: int | None = None
    mtp: MtpMode | None = None
    mix: bool | None = None
    kv_cache: str | None = None

    def __post_init__(self) -> None:
        """Raise FxquantError for values that the command line would refuse."""
        choice("target", self.target, Target)
        self.onnx_form()
        if self.mtp is not None:
            choice("mtp", self.mtp, MtpMode)
        for name in ("tp", "ep", "samples", "seq_len", "batch_size", "max_shard_size"):
            number = getattr(self, name)
            absent = number is None and name in ("tp", "ep")
            if not absent and (type(number) is not int or number < 1):
                raise FxquantError(f"{name}={number!r}", "not a whole number of 1 or more.", f"Pass {name}=1 or more.")
        if not isinstance(self.workers, Workers):
            fact = "not a Workers of fxquant.lowering.weights."
            raise FxquantError(f"workers={self.workers!r}", fact, "Pass Workers(), or Workers(jobs=2).")

    def onnx_form(self) -> OnnxForm:
        """How an ONNX graph is written. Raises FxquantError if that is said for a target that has none."""
        return self.form_for(self.target)

    def earlier_output(self, out: Path) -> Path | None:
        """The folder to reuse unchanged tensors from."""
        replaced = out if self.force and (out / MANIFEST).is_file() else None
        return as_path(self.reuse) or replaced

    def inputs(self, model: Path) -> list[Input]:
        """Every file and folder that the options and MODEL name. The reused output may be the one that is replaced."""
        named = {"--checkpoint": self.checkpoint, "--calib": self.calib, "--calibration": self.calibration}
        own = self.policy is not None and self.policy.endswith((".yaml", ".yml"))
        policy = self.policy if own and Path(str(self.policy)).exists() else None  # its reader reports a missing file
        named |= {"--policy": policy, REUSE: self.reuse}
        given = [Input(label, Path(path), label == REUSE) for label, path in named.items() if path is not None]
        return [Input("the checkpoint" if model.is_dir() else "the model", model), *given]


def as_path(path: Name) -> Path | None:
    """None stays None."""
    return None if path is None else Path(path)


def refuse_kv_cache(kv_cache: str | None) -> None:
    """Raise FxquantError for anything but float."""
    if kv_cache in (None, "float"):
        return
    if kv_cache == "int8":
        fact = (
            "the engines' W4A8 path has no int8 KV cache: its scales exclude mixed int4 experts, and quantizing the "
            "latent costs two to three points of accuracy."
        )
        raise FxquantError("--kv-cache int8", fact, "Keep the cache in float: it is latent, already 71 times smaller.")
    raise FxquantError(f"--kv-cache {kv_cache}", "unknown.", "Only float is supported.")
