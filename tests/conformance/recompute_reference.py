"""Recompute every tensor that the reference quantizer stored, from its model, by the formulas: do they mean its bytes?

usage: recompute_reference.py REFERENCE_DIR

REFERENCE_DIR holds `model/`, the outputs `v0_bf16_ascendV1/` (format `packed`) and `v1_bf16/` (format `per_channel`) of
msModelSlim, and the activations they were calibrated on, `v0_bf16_acts.safetensors` and `v1_bf16_acts.safetensors`.
Nothing of fxquant is imported: these are the formulas of docs/formats.md written a second time. Exits with 1 on any
tensor that differs.

v0 computes in float32; v1 in the model's dtype, with int4 scales found by repeated least squares. Where activations of
a static linear were not recorded, input_scale and input_offset are taken as stored, and not counted.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

EPS = 1.1920928955078125e-07
ROUNDS = 50
ROW_PARALLEL = ("down_proj", "o_proj")
"""Linears whose scale_bias is summed over 16 runs of k."""

Tensors = dict[str, Tensor]


def read(file: Path) -> Tensors:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in list(opened.keys())}


@dataclass(frozen=True)
class Output:
    """One output of the reference quantizer, and what it was made from.

    types        tensor name → type, as the description has it
    activations  module → what it was fed, one tensor a batch
    """

    tensors: Tensors
    types: dict[str, str]
    model: Tensors
    activations: dict[str, list[Tensor]]

    @classmethod
    def open(cls, reference: Path, name: str, activations: str) -> "Output":
        weights = {n: t for file in sorted((reference / name).glob("*.safetensors")) for n, t in read(file).items()}
        types = json.loads((reference / name / "quant_model_description.json").read_text(encoding="utf-8"))
        recorded: dict[str, list[Tensor]] = {}
        for key, tensor in sorted(read(reference / activations).items()):
            recorded.setdefault(key.rpartition(".")[0], []).append(tensor)
        return cls(weights, types, read(reference / "model" / "model.safetensors"), recorded)


# int8 and int4 weights


def int8_v0(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q, s: s = max|W| / 127, q = clamp(rne(W / s)), in float32."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return torch.round(weight.float() / scale).clamp(-128, 127), scale


def int8_v1(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same, every step in the dtype of the weight, s at least float32's eps."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=EPS)
    return torch.round(weight / scale).clamp(-128, 127), scale


def int4_v0(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """q4, s, second: q8 = rne(W / s) with s = max|W| / 119; second = max(1, rne(max|q8| / 7)) of each group."""
    scale = weight.float().abs().amax(1, keepdim=True) / 119
    groups = torch.round(weight.float() / scale).clamp(-128, 127).unflatten(1, (-1, group_size))
    second = torch.round(groups.abs().amax(-1) / 7).clamp(min=1)
    return torch.round(groups / second.unsqueeze(-1)).clamp(-8, 7).flatten(1), scale, second


def int4_v1(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q, s: from s = max|W| / 7, again and again q = rne(W / s) and then the s that fits q best, in least squares.

    A row keeps the pair with its least mean square error so far, and goes on from the latest q even so; the search ends
    when no row of the linear got better.
    """
    scale = (weight.abs().amax(1, keepdim=True) / 7).clamp(min=EPS)
    q = torch.round(weight / scale).clamp(-8, 7)
    best_q, best_scale, least = q, scale, _error(weight, q, scale)
    for _ in range(ROUNDS):
        scale = (weight * q).sum(1, keepdim=True) / (q * q).sum(1, keepdim=True)
        q = torch.round(weight / scale).clamp(-8, 7)
        error = _error(weight, q, scale)
        better = error < least
        if not better.any():
            break
        best_q, best_scale = torch.where(better, q, best_q), torch.where(better, scale, best_scale)
        least = torch.where(better, error, least)
    return best_q, best_scale


def _error(weight: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return ((q * scale - weight) ** 2).mean(1, keepdim=True)


def pack(q: Tensor) -> Tensor:
    """int8 [n/2, k]: row 2i in the low nibble, row 2i + 1 in the high one."""
    unsigned = q.to(torch.int32) % 16
    return (unsigned[0::2] + 16 * unsigned[1::2]).to(torch.uint8).view(torch.int8)


def scale_bias(codes: Tensor, scale: Tensor, module: str) -> Tensor:
    """float32 [n, 1], or [n, 16] where k is split over ranks: 8 * s * the sum of the codes."""
    chunks = 16 if module.endswith(ROW_PARALLEL) else 1
    sums = codes.double().unflatten(1, (chunks, -1)).sum(-1)
    return (8 * scale.double() * sums).float()


# all tensors of one linear


def dynamic(output: Output, module: str, quantize: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensors:
    q, scale = quantize(output.model[f"{module}.weight"])
    return {"weight": q.to(torch.int8), "weight_scale": scale.float(), "weight_offset": torch.zeros(len(q), 1)}


def two_level(output: Output, module: str) -> Tensors:
    q, scale, second = int4_v0(output.model[f"{module}.weight"], int(str(output.types["group_size"])))
    codes = q * second.repeat_interleave(q.shape[1] // second.shape[1], 1)
    return {
        "weight": pack(q),
        "weight_scale": scale,
        "weight_offset": torch.zeros(len(q), 1),
        "weight_scale_second": second,
        "weight_offset_second": torch.zeros_like(second, dtype=torch.int64),
        "scale_bias": scale_bias(codes, scale.bfloat16(), module),
    }


def per_channel(output: Output, module: str) -> Tensors:
    tensors = dynamic(output, module, int4_v1)
    bias = scale_bias(tensors["weight"], tensors["weight_scale"], module)
    return tensors | {"weight": pack(tensors["weight"]), "scale_bias": bias}


def static_v0(output: Output, module: str) -> Tensors:
    tensors = dynamic(output, module, int8_v0)
    tensors |= activation_v0(output.activations[module]) if module in output.activations else {}
    scale, offset = (output.tensors[f"{module}.{name}"] for name in ("input_scale", "input_offset"))
    return tensors | fused(tensors["weight"], scale.float() * tensors["weight_scale"].flatten(), offset)


def static_v1(output: Output, module: str) -> Tensors:
    tensors = dynamic(output, module, int8_v1)
    dtype = output.model[f"{module}.weight"].dtype
    weight_scale = tensors.pop("weight_scale").flatten().to(dtype)
    del tensors["weight_offset"]
    tensors |= activation_v1(output.activations[module]) if module in output.activations else {}
    scale, offset = (output.tensors[f"{module}.{name}"] for name in ("input_scale", "input_offset"))
    return tensors | fused(tensors["weight"], (scale.to(dtype) * weight_scale).float(), offset)


def fused(q: Tensor, deq_scale: Tensor, offset: Tensor) -> Tensors:
    """Without a bias, quant_bias is what the offset adds: -offset * the sum of q over k."""
    shift = -offset.double() * q.double().sum(1)
    return {"deq_scale": deq_scale, "quant_bias": shift.to(torch.int32)}


def activation_v0(batches: list[Tensor]) -> Tensors:
    """lo, hi: means over the batches of their extremes, in the dtype of the activations."""
    low = torch.stack([batch.min() for batch in batches]).mean().clamp(max=0)
    high = torch.stack([batch.max() for batch in batches]).mean().clamp(min=0)
    return _activation(low, (high - low) / 255)


def activation_v1(batches: list[Tensor]) -> Tensors:
    """lo, hi: the extremes of all batches."""
    low = torch.stack([batch.min() for batch in batches]).min().clamp(max=0)
    high = torch.stack([batch.max() for batch in batches]).max().clamp(min=0)
    return {name: value.float() for name, value in _activation(low, high / 255 - low / 255).items()}


def _activation(low: Tensor, scale: Tensor) -> Tensors:
    scale = scale.clamp(min=EPS)
    return {"input_scale": scale.view(1), "input_offset": (torch.round(-low / scale) - 128).clamp(-128, 127).view(1)}


V0 = {"W8A8_DYNAMIC": lambda o, m: dynamic(o, m, int8_v0), "W8A8": static_v0, "W4A8_DYNAMIC": two_level}
V1 = {"W8A8_DYNAMIC": lambda o, m: dynamic(o, m, int8_v1), "W8A8": static_v1, "W4A8_DYNAMIC": per_channel}
OUTPUTS = {
    "v0_bf16_ascendV1": ("v0_bf16_acts.safetensors", V0),
    "v1_bf16": ("v1_bf16_acts.safetensors", V1),
}


def recomputed(output: Output, formulas: dict[str, Callable[[Output, str], Tensors]]) -> Tensors:
    """Stored name → what it should be; float tensors are the model's own."""
    tensors = {}
    for name, tensor in output.tensors.items():
        module, _, suffix = name.rpartition(".")
        kind = output.types[name]
        if kind == "FLOAT":
            tensors[name] = output.model[name].to(tensor.dtype)
        elif suffix == "weight":
            tensors |= {f"{module}.{key}": value for key, value in formulas[kind](output, module).items()}
    return tensors


def same_bytes(tensor: Tensor, other: Tensor) -> bool:
    """Equal dtype, shape and bits, but for the sign of a zero."""
    return tensor.dtype is other.dtype and tensor.shape == other.shape and torch.equal(tensor, other)


def compare(reference: Path, name: str) -> int:
    """Print one line a type and suffix; the number of tensors that differ."""
    activations, formulas = OUTPUTS[name]
    output = Output.open(reference, name, activations)
    expected = recomputed(output, formulas)
    agree, all_, differ = Counter[str](), Counter[str](), sorted(set(expected) - set(output.tensors))
    for stored, tensor in sorted(output.tensors.items()):
        kind = f"{output.types[stored]:14} .{stored.rpartition('.')[2]}"
        all_[kind] += 1
        if stored in expected:
            same = same_bytes(expected[stored], tensor)
            agree[kind] += same
            differ += [] if same else [stored]
    for kind in sorted(all_):
        left = sum(
            f"{output.types[n]:14} .{n.rpartition('.')[2]}" == kind and n not in expected for n in output.tensors
        )
        print(f"{name:18} {kind:38} {agree[kind]:4} of {all_[kind]:4}" + (f", {left} as stored" if left else ""))
    print(*(f"  differs: {stored}" for stored in differ), sep="\n", end="\n" if differ else "")
    return len(differ)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(1 if sum(compare(Path(sys.argv[1]), name) for name in OUTPUTS) else 0)
