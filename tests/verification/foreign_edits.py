"""What users do to published folders by hand, and what of it `verify` must name."""

import json
from collections.abc import Callable
from typing import Any

import torch
from foreign_folders import Edit, Published
from safetensors.torch import save_file

EXPERT = "model.layers.1.mlp.experts.1.down_proj"
DENSE = "model.layers.0.mlp.gate_proj"
OUT = "model.layers.0.self_attn.o_proj"
GATE_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def renamed(name: str) -> Edit:
    """The description under another name."""
    return lambda published: lambda: published.described.rename(published.path / name)


def header(**keys: Any) -> Edit:
    return lambda published: published.description.update(keys)


def without(*keys: str) -> Edit:
    return lambda published: [published.description.pop(key) for key in keys] and None


def config(**keys: Any) -> Edit:
    return lambda published: published.config.update(keys)


def retyped(module: str, scheme: str) -> Edit:
    return lambda published: published.description.update(dict.fromkeys(published.module(module), scheme))


def dropped(name: str) -> Edit:
    def drop(published: Published) -> None:
        del published.tensors[name], published.description[name]

    return drop


def lost(part: str) -> Edit:
    """Tensors with this in their names; their entries stay."""

    def lose(published: Published) -> None:
        for name in [name for name in published.tensors if part in name]:
            del published.tensors[name]

    return lose


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda published: published.tensors.update({name: change(published.tensors[name])})


def one_row(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[3] *= factor
        return tensor

    return change


def swapped_experts(published: Published) -> None:
    for name in published.module(EXPERT):
        other = name.replace("experts.1.", "experts.0.")
        both = published.tensors[other], published.tensors[name]
        published.tensors[name], published.tensors[other] = both


def stale_index(published: Published) -> Callable[[], None]:
    def write() -> None:
        document = json.loads(published.index.read_text())
        document["weight_map"][f"{EXPERT}.weight"] = "quant_model_weights-00002-of-00002.safetensors"
        published.index.write_text(json.dumps(document))

    return write


def twice(published: Published) -> Callable[[], None]:
    """A second file, left of another run."""
    name = published.weights.name.replace("00001-of-00001", "00002-of-00002")
    return lambda: save_file({f"{DENSE}.weight": published.tensors[f"{DENSE}.weight"]}, published.path / name)


EDITS: dict[str, tuple[Edit, str]] = {
    "description renamed": (
        renamed("quant_model_description_w8a8_dynamic.json"), "the description is quant_model_description_w8a8_dynamic"
    ),
    "description under a name of its own": (renamed("description.json"), "the description is description.json"),
    "group_size halved": (header(group_size=16), "group_size 16, the second scales of model.layers.1.mlp.experts.0"),
    "group_size as text": (header(group_size="64"), "group_size '64', the second scales"),
    "group_size 0": (header(group_size=0), "have groups of 64"),
    "group_size deleted": (without("group_size"), "group_size is missing"),
    "version deleted": (without("version"), "version is missing, packed int4 is 1.0.0"),
    "version of unpacked int4": (header(version="0"), "version '0'"),
    "model_quant_type edited": (
        header(model_quant_type="W4A4"), "model_quant_type 'W4A4', the types of modules are W4A8_DYNAMIC, W8A8, W8A8_"
    ),
    "model_quant_type float": (header(model_quant_type="FLOAT"), "model_quant_type 'FLOAT'"),
    "model_quant_type deleted": (without("model_quant_type"), "model_quant_type is missing"),
    "quantized cache announced": (header(kv_quant_type="C8"), "kv_quant_type 'C8'"),
    "entry deleted": (without(f"{EXPERT}.weight_scale"), f"no entry for {EXPERT}.weight_scale"),
    "entry of nothing": (
        header(**{"model.layers.1.mlp.experts.9.up_proj.weight": "W4A8_DYNAMIC"}), "but no file has it"
    ),
    "entry misspelt": (
        header(**{f"{EXPERT}.weight": "W4A8DYNAMIC"}), "W4A8DYNAMIC, the other experts of its layer are"
    ),
    "one tensor of another type": (header(**{f"{EXPERT}.scale_bias": "W8A8_DYNAMIC"}), f"{EXPERT}.scale_bias is W8A8"),
    "one expert of another type": (retyped(EXPERT, "W8A8_DYNAMIC"), "the other experts of its layer are W4A8_DYNAMIC"),
    "a linear called int4": (retyped(DENSE, "W4A8_DYNAMIC"), f"group sizes 0 for {DENSE}, 64 for"),
    "attention called dynamic": (retyped(OUT, "W8A8_DYNAMIC"), f"{OUT}.deq_scale: no engine reads it"),
    "a quantized linear called float": (retyped(DENSE, "FLOAT"), f"{DENSE}.weight_scale"),
    "tensor dropped": (dropped(f"{EXPERT}.scale_bias"), f"{EXPERT}.scale_bias: missing"),
    "weight lost, its entry kept": (lost(f"{EXPERT}.weight"), f"{EXPERT}.weight: missing"),
    "weights of all experts lost": (lost(".experts."), "down_proj.weight: missing"),
    "weight without a shape": (changed(f"{EXPERT}.weight", lambda t: t[0, 0]), f"{EXPERT}.weight: int8[]"),
    "float head dropped": (dropped("lm_head.weight"), "lm_head.weight: missing"),
    "tensor renamed": (
        lambda published: [
            side.update({"model.extra.weight": side.pop("model.norm.weight")})  # type: ignore[attr-defined]
            for side in (published.tensors, published.description)
        ] and None,
        "model.extra.weight: no engine reads it",
    ),
    "index of another run": (stale_index, "quant_model_weights-00002-of-00002.safetensors, it is in"),
    "file of another run": (twice, f"{DENSE}.weight: in quant_model_weight_w8a8_dynamic-00001"),
    "config.json lost": (lambda published: (published.path / "config.json").unlink, "config.json: missing"),
    "fp8 of the source left": (config(quantization_config={"quant_method": "fp8"}), "is left from the source"),
    "prediction layer announced": (config(num_nextn_predict_layers=1), "num_nextn_predict_layers 1, 0 are stored"),
    "rope_theta edited": (config(rope_theta=50000), "rope_theta: 50000.0, the source has 10000.0"),
    "top-k edited": (config(num_experts_per_tok=1), "num_experts_per_tok: 1, the source has 2"),
    "scale_bias zero": (changed(f"{EXPERT}.scale_bias", torch.zeros_like), f"{EXPERT}.scale_bias: not 8 times"),
    "scale_bias of one scale": (changed(f"{EXPERT}.scale_bias", lambda t: t / 8), f"{EXPERT}.scale_bias: not 8 times"),
    "offset not zero": (changed(f"{EXPERT}.weight_offset", torch.ones_like), f"{EXPERT}.weight_offset: not zero"),
    "nibbles swapped": (changed(f"{EXPERT}.weight", lambda t: (t << 4) | (t >> 4 & 15)), f"{EXPERT}.weight: "),
    "one row's scale doubled": (changed(f"{EXPERT}.weight_scale", one_row(2)), f"{EXPERT}.weight: "),
    "one row's scale a tenth off": (changed(f"{DENSE}.weight_scale", one_row(1.1)), f"{DENSE}.weight: "),
    "scales in bfloat16": (changed(f"{EXPERT}.weight_scale", lambda t: t.bfloat16()), "weight_scale: bfloat16["),
    "second scales off the integers": (
        changed(f"{EXPERT}.weight_scale_second", lambda t: t + 0.5), "weight_scale_second: not all integers"
    ),
    "experts exchanged": (swapped_experts, f"{EXPERT}.weight: "),
    "norm edited": (changed("model.norm.weight", one_row(1.5)), "lm_head.weight: "),
    "head edited": (changed("lm_head.weight", one_row(1.5)), "lm_head.weight: "),
    "router's bias edited": (changed(GATE_BIAS, lambda t: t + 1), f"{GATE_BIAS}: differs from the source"),
    "deq_scale edited": (changed(f"{OUT}.deq_scale", one_row(1.5)), f"{OUT}.deq_scale is not"),
    "deq_scale of a float16 model": (
        changed(f"{OUT}.deq_scale", lambda t: t.view(torch.int32).long()), "deq_scale: int64"
    ),
    "quant_bias one more": (changed(f"{OUT}.quant_bias", lambda t: t + 1), f"{OUT}.quant_bias of output 0"),
    "input_offset as a fraction": (changed(f"{OUT}.input_offset", lambda t: t + 0.5), f"{OUT}.input_offset is"),
}  # fmt: skip
"""Name → the edit of a folder of two levels for target ascend, and what one of the misses must hold."""
