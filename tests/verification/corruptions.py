"""Ways to damage a compiled folder on disk, and what of each must be named.

A damage is as a careless converter would make it: the safetensors file is rewritten whole, with correct headers.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxquant.lowering.output_folder.description import write_json
from fxquant.lowering.output_folder.manifest import MANIFEST

EXPERTS = "model.layers.1.mlp.experts"
GATE, UP, DOWN = (f"{EXPERTS}.1.{name}_proj" for name in ("gate", "up", "down"))
DENSE = "model.layers.0.mlp.gate_proj"
Q_A, KV_A, OUT, LATER_OUT = (
    "model.layers.0.self_attn.q_a_proj",
    "model.layers.0.self_attn.kv_a_proj_with_mqa",
    "model.layers.0.self_attn.o_proj",
    "model.layers.1.self_attn.o_proj",
)
NORM = "model.norm.weight"


@dataclass
class Folder:
    """The weight file and the documents of a compiled folder, to change and write back."""

    path: Path
    tensors: dict[str, Tensor]
    description: dict[str, Any]
    config: dict[str, Any]

    @property
    def packed(self) -> bool:
        return f"{DOWN}.scale_bias" in self.tensors

    def suffixes(self, module: str) -> list[str]:
        return [name.removeprefix(f"{module}.") for name in self.tensors if name.rpartition(".")[0] == module]

    def exchange(self, module: str, other: str) -> None:
        """All tensors of two modules."""
        for suffix in self.suffixes(module):
            names = f"{module}.{suffix}", f"{other}.{suffix}"
            self.tensors |= dict(zip(names, (self.tensors[names[1]], self.tensors[names[0]]), strict=True))


Change = Callable[[Folder], object]


@dataclass(frozen=True)
class Corruption:
    """change    what is done to a folder; None where the folder has nothing of the sort
    needs     the suffix, or the file's key, without which it makes no sense
    named     what one of the misses must hold
    unread    the engine reads nothing of it, so its reader can't see it
    sections  it is in the types of config.json, one for each section
    ranks     tensor-parallel ranks on which the engine's reader sees it
    """

    change: Change
    named: str
    needs: str = ""
    unread: bool = False
    sections: bool = False
    ranks: int = 1

    def fits(self, folder: Folder) -> bool:
        return not self.needs or any(name.endswith(self.needs) for name in folder.tensors)


def open_folder(path: Path) -> Folder:
    (weights,), (description,) = path.glob("*.safetensors"), path.glob("quant_model_description*.json")
    documents = (json.loads(file.read_text()) for file in (description, path / "config.json"))
    return Folder(path, load_file(weights), *documents)


def damaged(source: Path, copy: Path, change: Change) -> Path:
    """A copy of `source` with the change in it and no manifest, its index saying what the file holds."""
    shutil.copytree(source, copy)
    (copy / MANIFEST).unlink()
    folder = open_folder(copy)
    change(folder)
    (weights,), (description,) = copy.glob("*.safetensors"), copy.glob("quant_model_description*.json")
    save_file({name: tensor.contiguous() for name, tensor in folder.tensors.items()}, weights)
    write_json(description, folder.description)
    write_json(copy / "config.json", folder.config)
    for index in copy.glob("*.safetensors.index.json"):
        total = sum(tensor.nbytes for tensor in folder.tensors.values())
        weight_map = dict.fromkeys(sorted(folder.tensors), weights.name)
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return copy


def swap_nibbles(folder: Folder) -> None:
    weight = folder.tensors[f"{DOWN}.weight"]
    folder.tensors[f"{DOWN}.weight"] = (weight << 4) | (weight >> 4 & 15)


def roll(name: str, axis: int) -> Change:
    return lambda folder: folder.tensors.update({name: folder.tensors[name].roll(1, axis)})


def swap_columns(folder: Folder) -> None:
    """The first and the last of 16, which belong to different ranks on any number of them."""
    bias = folder.tensors[f"{DOWN}.scale_bias"]
    folder.tensors[f"{DOWN}.scale_bias"] = bias[:, [15, *range(1, 15), 0]]


def delete(name: str) -> Change:
    def change(folder: Folder) -> None:
        del folder.tensors[name], folder.description[name]

    return change


def transpose(folder: Folder) -> None:
    folder.tensors[f"{DENSE}.weight"] = folder.tensors[f"{DENSE}.weight"].T


def permute_rows(folder: Folder) -> None:
    """Every row of every tensor two further: a byte of a packed weight holds two."""
    for suffix in folder.suffixes(DOWN):
        step = 1 if suffix == "weight" and folder.packed else 2
        folder.tensors[f"{DOWN}.{suffix}"] = folder.tensors[f"{DOWN}.{suffix}"].roll(step, 0)


def add(name: str, amount: float, row: int | None = None) -> Change:
    return lambda folder: folder.tensors[name][slice(None) if row is None else row].add_(amount)


def scale_row(name: str, factor: float) -> Change:
    return lambda folder: folder.tensors[name][3].mul_(factor)


def foreign_deq_scale(folder: Folder) -> None:
    folder.tensors[f"{OUT}.deq_scale"] = folder.tensors[f"{LATER_OUT}.deq_scale"].clone()


def unequal_input_scales(folder: Folder) -> None:
    """deq_scale goes with it, so that kv_a_proj by itself is consistent."""
    for suffix in ("input_scale", "deq_scale"):
        folder.tensors[f"{KV_A}.{suffix}"] *= 2


def exchange_experts(folder: Folder) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        folder.exchange(f"{EXPERTS}.0.{name}", f"{EXPERTS}.1.{name}")


def narrow_scale(folder: Folder) -> None:
    folder.tensors[f"{DOWN}.weight_scale"] = folder.tensors[f"{DOWN}.weight_scale"].bfloat16()


def extra(name: str) -> Change:
    def change(folder: Folder) -> None:
        folder.tensors[name] = torch.zeros(1)
        folder.description[name] = "FLOAT" if name.startswith("model.extra") else "W4A8_DYNAMIC"

    return change


def describe(*names: str) -> Change:
    return lambda folder: folder.description.update(dict.fromkeys(names, "W8A8_DYNAMIC"))


def describe_module(folder: Folder) -> None:
    describe(*(f"{DOWN}.{suffix}" for suffix in folder.suffixes(DOWN)))(folder)


def stale_group_size(folder: Folder) -> None:
    """Another group size where the engine looks for it: the description's header, or config.json."""
    header = folder.config["quantization_config"] if "group_size" not in folder.description else folder.description
    header["group_size"] += 64


def stale_quantize(folder: Folder) -> None:
    folder.config["moe_quantize"] = "w8a8_dynamic"


CORRUPTIONS = {
    "nibbles swapped": Corruption(swap_nibbles, f"{DOWN}.weight", needs=".scale_bias"),
    "second scales one group on": Corruption(
        roll(f"{DOWN}.weight_scale_second", 1), f"{DOWN}.weight_scale_second", needs=".weight_scale_second"
    ),
    "scale_bias zero": Corruption(
        lambda folder: folder.tensors[f"{DOWN}.scale_bias"].zero_(), f"{DOWN}.scale_bias", needs=".scale_bias"
    ),
    "scale_bias deleted": Corruption(delete(f"{DOWN}.scale_bias"), f"{DOWN}.scale_bias", needs=".scale_bias"),
    "gate and up of an expert swapped": Corruption(lambda folder: folder.exchange(GATE, UP), f"{GATE}.weight"),
    "square weight transposed": Corruption(transpose, f"{DENSE}.weight"),
    "scale_bias columns one rank on": Corruption(
        roll(f"{DOWN}.scale_bias", 1), f"{DOWN}.scale_bias", needs=".scale_bias", ranks=2
    ),
    "two scale_bias columns swapped": Corruption(swap_columns, f"{DOWN}.scale_bias", needs=".scale_bias", ranks=2),
    "input_offset one more": Corruption(add(f"{Q_A}.input_offset", 1), f"{Q_A}.input_offset is"),
    "input_offset of an unfused linear one more": Corruption(add(f"{OUT}.input_offset", 1), f"{OUT}.input_offset is"),
    "quant_bias one more": Corruption(add(f"{OUT}.quant_bias", 1, row=3), f"{OUT}.quant_bias of output 3"),
    "deq_scale of another linear": Corruption(foreign_deq_scale, f"{OUT}.deq_scale is"),
    "q_a and kv_a input_scale unequal": Corruption(unequal_input_scales, f"{KV_A}.input_scale is"),
    "one row's scale doubled": Corruption(scale_row(f"{DOWN}.weight_scale", 2), f"{DOWN}.weight_scale"),
    "one row's scale of an int8 linear doubled": Corruption(
        scale_row(f"{DENSE}.weight_scale", 2), f"{DENSE}.weight_scale"
    ),
    "rows permuted with their scales": Corruption(permute_rows, f"{DOWN}.weight"),
    "experts 0 and 1 exchanged": Corruption(exchange_experts, f"{EXPERTS}.0.gate_proj.weight"),
    "weight_scale in bfloat16": Corruption(narrow_scale, f"{DOWN}.weight_scale: torch.bfloat16"),
    "weight_offset not zero": Corruption(add(f"{DOWN}.weight_offset", 1, row=3), f"{DOWN}.weight_offset", unread=True),
    "extra tensor in a module": Corruption(extra(f"{DOWN}.zero_point"), f"{DOWN}.zero_point: in the files"),
    "extra tensor of no module": Corruption(extra("model.extra.weight"), "model.extra.weight: in", unread=True),
    "norm weight changed": Corruption(add(NORM, 1, row=3), f"{NORM}: differs from the source", unread=True),
    "type of one tensor stale": Corruption(describe(f"{DOWN}.weight_scale"), f"{DOWN}.weight_scale: 'W8A8_DYNAMIC'"),
    "type of one module stale": Corruption(describe_module, f"{DOWN}.weight: 'W8A8_DYNAMIC'"),
    "group_size stale": Corruption(stale_group_size, "group_size"),
    "moe_quantize of config.json stale": Corruption(stale_quantize, "moe_quantize", unread=True, sections=True),
}
"""`unread` by the reader: engines read float tensors and config.json, but no quantized linear does."""
