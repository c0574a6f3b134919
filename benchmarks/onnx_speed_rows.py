"""The rows of onnx_speed.py: our graphs, and what others make of our float graph or of the checkpoint."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import inliner
from onnx_speed_peers import fold, quantize_dynamic, quantize_nbits
from onnx_speed_process import Row

from fxquant import ops
from fxquant.compilation.options import CompileOptions
from fxquant.engines.onnx_profile import DEFAULT, OnnxProfile
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
            for profile in OnnxProfile:
                made[f"{Path(policy).stem} {profile}"] = partial(self._ours, policy, profile)
        for label in (SAME, ALL):
            made[f"quantize_dynamic, {label}"] = partial(self._other, label, "dynamic", quantize_dynamic)
            for level in (0, 4):
                quantize = partial(quantize_nbits, level)
                made[f"MatMulNBits level {level}, {label}"] = partial(self._other, label, f"nbits-{level}", quantize)
        made[f"OpenVINO, {self.policies[0]} qdq"] = self._openvino
        for dtype in ("float32", "bfloat16"):
            made[f"transformers eager, {dtype}"] = partial(self._transformers, "transformers", dtype)
        made["transformers, torch.compile, float32"] = partial(self._transformers, "torch.compile", "float32")
        return made

    def _ours(self, policy: str, profile: OnnxProfile) -> Row:
        return Row("onnxruntime", self._compiled(policy, profile))

    def _float(self) -> Path:
        return self._compiled("float", DEFAULT)

    def _compiled(self, policy: str, profile: OnnxProfile) -> Path:
        """The same weights as an earlier one of the policy are copied."""
        out, stem = self.folder / f"{Path(policy).stem}-{profile}", Path(policy).stem
        if not out.exists():
            errors.print(f"{policy}, {profile}")
            earlier = next((done for other in OnnxProfile if (done := self.folder / f"{stem}-{other}").exists()), None)
            options = CompileOptions(
                policy=policy, target=Target.ONNX, out=out, onnx_profile=profile, calib=self.calib, reuse=earlier,
                verify=False,
            )  # fmt: skip
            compile(self.model, options, reporter(False))
        return out

    def _formed(self) -> Path:
        """The float graph without the pass that lets attention absorb kv_b_proj: as one writes it down."""
        source, out = self._float(), self.folder / "formed"
        if not out.exists():
            program = deploy(load_program(source / GRAPH), lambda _: []).program
            model = ir.to_proto(build_model(program, WeightFiles(source).infos, DEFAULT))
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
        program = load_program(self._compiled(self.policies[0], DEFAULT) / GRAPH)
        deployed = deployment(program, DEFAULT).program
        return [node.name for node in (*deployed.nodes(ops.linear), *deployed.nodes(ops.router_logits))]

    def _openvino(self) -> Row:
        if not find_spec("openvino"):
            raise MissingRowError("it is not installed: pip install openvino")
        source, out = self._compiled(self.policies[0], OnnxProfile.QDQ), self.folder / "inlined"
        model = inliner.inline_local_functions(onnx.load(source / FILE, load_external_data=False))
        onnx.save(model, _linked(source, out) / FILE)
        return Row("openvino", out)

    def _transformers(self, way: str, dtype: str) -> Row:
        if not find_spec("transformers"):
            raise MissingRowError("it is not installed: pip install transformers")
        if way == "torch.compile" and not any(map(shutil.which, ("g++", "clang++"))):
            raise MissingRowError("there is no C++ compiler")
        return Row(way, self.model, dtype)


def _linked(source: Path, out: Path) -> Path:
    """A folder with the weight files of another one."""
    out.mkdir()
    for file in source.glob("*.safetensors"):
        os.link(file, out / file.name)
    return out
