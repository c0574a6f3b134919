"""Folders as the reference quantizer publishes them, made of ours: no file of fxquant, its names, an index always."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fxquant.engines.table import ENGINES
from fxquant.lowering.output_folder.description import write_json
from fxquant.schemes.weight_formats import WeightFormat
from fxquant.verification import VerifyReport

NAMES = {"quant_model_weight_w8a8": "quant_model_weight_w8a8_dynamic"}
"""Stem of our weight files → of the reference tool's, where it is another."""
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 128, "n_routed_experts": 2, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
GROUPS = "[{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 64}]"
CLIPPED = "[{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 64, algorithm: clip}]"
POLICIES = {
    "groups": f"description: two levels\nextends: deepseek_w4a8\nrules: {GROUPS}\n",
    "clip": f"description: two levels, clipped\nextends: deepseek_w4a8\nrules: {CLIPPED}\n",
    "m4": f"description: as the W4A8 script smooths\nextends: deepseek_w4a8_msmodelslim_m4\nrules: {GROUPS}\n",
    "flex": (
        "description: scales alone\nextends: deepseek_w4a8_per_channel\nsmooth: [{kind: attention, method: flex}]\n"
    ),
    "gptq": (
        "description: codes of GPTQ\nextends: deepseek_w4a8_per_channel\n"
        "rules: [{kind: routed_expert, scheme: W4A8_DYNAMIC, algorithm: gptq}]\n"
    ),
    "static": "deepseek_w4a8_per_channel_static",
}
UNPACKED = next(target for target, engine in ENGINES.items() if engine.weight_format(32) is WeightFormat.UNPACKED)


@dataclass
class Published:
    """A published folder, open to be edited."""

    path: Path
    tensors: dict[str, Tensor]
    description: dict[str, Any]
    config: dict[str, Any]

    @property
    def weights(self) -> Path:
        (file,) = self.path.glob("*.safetensors")
        return file

    @property
    def described(self) -> Path:
        (file,) = self.path.glob("quant_model_description*.json")
        return file

    @property
    def index(self) -> Path:
        (file,) = self.path.glob("*.index.json")
        return file

    def module(self, module: str) -> list[str]:
        """Names of its tensors."""
        return [name for name in self.tensors if name.rpartition(".")[0] == module]

    def save(self) -> None:
        """Write it back; the index says what the file holds."""
        file = self.weights
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, file)
        write_json(self.described, self.description)
        write_json(self.path / "config.json", self.config)
        weight_map = dict.fromkeys(sorted(self.tensors), file.name)
        write_json(self.index, {"metadata": {}, "weight_map": weight_map})


Edit = Callable[[Published], object]


def publish(compiled: Path, folder: Path, **config: Any) -> Path:
    """`compiled` without a file of fxquant, under the names that the reference tool gives; `config`: more keys."""
    ours = ("fxquant_*", "model_ascend.py", "*.pt2", "model.onnx*")
    shutil.copytree(compiled, folder, ignore=shutil.ignore_patterns(*ours))
    (file,) = folder.glob("*.safetensors")
    stem = file.name.removesuffix(".safetensors").split("-0")[0]
    stem = NAMES.get(stem, stem)
    file.rename(folder / f"{stem}-00001-of-00001.safetensors")
    for index in folder.glob("*.index.json"):
        index.unlink()
    write_json(folder / f"{stem}.safetensors.index.json", {})
    published = open_published(folder)
    published.config |= config
    published.save()
    return folder


def open_published(folder: Path) -> Published:
    (file,), (description,) = folder.glob("*.safetensors"), folder.glob("quant_model_description*.json")
    documents = (json.loads(path.read_text()) for path in (description, folder / "config.json"))
    return Published(folder, load_file(file), *documents)


def edited(folder: Path, copy: Path, edit: Edit) -> Path:
    """A copy of `folder` after `edit`, which is saved before what it does to the files themselves."""
    published = open_published(Path(shutil.copytree(folder, copy)))
    after = edit(published)
    published.save()
    if callable(after):
        after()
    return copy


def misses(report: VerifyReport) -> list[str]:
    """Every difference, after the name of its check."""
    return [f"{check.name}: {miss}" for check in report.checks for miss in check.misses]
