"""The rows of onnx_speed.py: our graphs, and what others make of our float graph or of the checkpoint."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import inliner
from onnx_speed_peers import fold, quantize_dynamic, quantize_nbits
from onnx_speed_process import Row

from fxquant import ops
from fxquant.compilation.options import CompileOptions
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.engines.table import Target
from fxquant.inputs.paths import GRAPH
from fxquant.lowering.deployment import deploy
from fxquant.lowering.onnx.deployment import deployment
from fxquant.lowering.onnx.writer import FILE, build_model
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.program.program_file import load_program
from fxquant.tools.console import errors
from fxquant.tools.stages import reporter
from fxquant.verbs.compile import compile

FLOAT = "float32"
SAME, ALL = "same layers", "all it can"
"""Of a peer's rows: in float are those linears that the policy leaves, or none."""
QDQ: dict[str, Any] = {"onnx_profile": OnnxProfile.QDQ}
LEVELS = (0, 4)
Make = Callable[[], Row]


class MissingRowError(Exception):
    """A row that cannot be measured; says why."""


@dataclass(frozen=True)
class Subjects:
    """model     the checkpoint
    calib     token ids or text to calibrate static linears with
    policies  those of our rows; the first also says what peers leave in float
    folder    where everything is made, once
    """

    model: Path
    calib: Path
    policies: tuple[str, ...]
    folder: Path

    def rows(self) -> dict[str, Make]:
        """Name → what makes it, or raises MissingRowError; the first is the row that ratios are to."""
        made: dict[str, Make] = {
            FLOAT: lambda: Row("onnxruntime", self._float()),
            f"{FLOAT}, keys and values formed": lambda: Row("onnxruntime", self._formed()),
        }
        for policy in self.policies:
            for form, choices in forms():
                made[f"{Path(policy).stem} {form}"] = partial(self._ours, policy, choices)
        for label in (SAME, ALL):
            made[f"quantize_dynamic, {label}"] = partial(self._other, label, "dynamic", quantize_dynamic)
            for level in LEVELS:
                quantize = partial(quantize_nbits, level)
                made[f"MatMulNBits level {level}, {label}"] = partial(self._other, label, f"nbits-{level}", quantize)
        made[f"OpenVINO, {self.policies[0]} qdq"] = self._openvino
        for dtype in ("float32", "bfloat16"):
            made[f"transformers eager, {dtype}"] = partial(self._transformers, "transformers", dtype)
        made["transformers, torch.compile, float32"] = partial(self._transformers, "torch.compile", "float32")
        return made

    def _ours(self, policy: str, choices: dict[str, Any]) -> Row:
        return Row("onnxruntime", self._compiled(policy, choices))

    def _float(self) -> Path:
        return self._compiled("float", QDQ)

    def _compiled(self, policy: str, choices: dict[str, Any]) -> Path:
        """Weights that an earlier form of the policy has too are copied."""
        stem, form = Path(policy).stem, "-".join(map(str, choices.values()))
        out = self.folder / f"{stem}-{form}"
        if not out.exists():
            errors.print(f"{stem}, {form}")
            earlier = next(iter(sorted(self.folder.glob(f"{stem}-{OnnxProfile.QDQ}"))), None)
            options = CompileOptions(
                policy=policy, target=Target.ONNX, out=out, calib=self.calib, reuse=earlier, verify=False, **choices
            )
            compile(self.model, options, reporter(False))
        return out

    def _formed(self) -> Path:
        """The float graph without the pass that lets attention absorb kv_b_proj: as one writes it down."""
        source, out = self._float(), self.folder / "formed"
        if not out.exists():
            program = deploy(load_program(source / GRAPH), lambda _: []).program
            model = ir.to_proto(build_model(program, WeightFiles(source).infos, OnnxForm()))
            (_linked(source, out) / FILE).write_bytes(model.SerializeToString(deterministic=True))
        return out

    def _other(self, label: str, name: str, quantize: Callable[[Path, Path, list[str] | None], None]) -> Row:
        """A tool of onnxruntime on the float graph. To one that quantizes all it can, kv_b_proj must be a linear."""
        kind = label.split()[0]
        folded, out = self.folder / f"folded-{kind}", self.folder / f"{name}-{kind}"
        source, kept = (self._float(), self._kept()) if label == SAME else (self._formed(), None)
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
            if not folded.exists():
                errors.print(f"folding for {label}")
                processes.submit(fold, source, folded).result()
            errors.print(f"{name}, {label}")
            processes.submit(quantize, folded, out, kept).result()
        return Row("onnxruntime", out)

    def _kept(self) -> list[str]:
        """Values of the linears that the first policy leaves in float."""
        program = load_program(self._compiled(self.policies[0], QDQ) / GRAPH)
        deployed = deployment(program, OnnxForm()).program
        return [node.name for node in (*deployed.nodes(ops.linear), *deployed.nodes(ops.router_logits))]

    def _openvino(self) -> Row:
        if not find_spec("openvino"):
            raise MissingRowError("it is not installed: pip install openvino")
        source, out = self._compiled(self.policies[0], QDQ), self.folder / "inlined"
        model = inliner.inline_local_functions(onnx.load(source / FILE, load_external_data=False))
        onnx.save(model, _linked(source, out) / FILE)
        return Row("openvino", out)

    def _transformers(self, way: str, dtype: str) -> Row:
        if not find_spec("transformers"):
            raise MissingRowError("it is not installed: pip install transformers")
        if way == "torch.compile" and not any(map(shutil.which, ("g++", "clang++"))):
            raise MissingRowError("there is no C++ compiler")
        return Row(way, self.model, dtype)


def forms() -> Iterator[tuple[str, dict[str, Any]]]:
    """Title and options of each profile, and of one with onnxruntime's own operators at both accuracy levels."""
    for profile in OnnxProfile:
        if getattr(profile, "contrib", False):
            for level in LEVELS:
                yield f"{profile} level {level}", {"onnx_profile": profile, "onnx_accuracy_level": level}
        else:
            yield profile.value, {"onnx_profile": profile}


def _linked(source: Path, out: Path) -> Path:
    """A folder with the weight files of another one."""
    out.mkdir()
    for file in source.glob("*.safetensors"):
        os.link(file, out / file.name)
    return out
