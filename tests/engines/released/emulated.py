"""fxquant's own reader of a folder against a released vllm-ascend on the same rank: equal codes, results within bounds.

Engine and reader get the same input, and the reader the integers that the engine made of it, after comparing its own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import computed
import npu_operators
import torch
from graph_parts import FLOAT, GraphParts
from held import FUSED, LINEARS, ROW_PARALLEL, expected_experts, expected_linear
from open_readers import open_reader
from torch import Tensor, nn
from vllm_world import Place

from fxquant.engine_readers import Arithmetic, EngineReader
from fxquant.engine_readers.arithmetic import half_step, nibbles
from fxquant.engine_readers.linear_loader import MixedLinear
from fxquant.errors import FxquantError

FP16, FP19 = 2.0**-11, 2.0**-10
"""Relative errors of rounding to float16, and of cutting a scale to the 19 bits that a device reads."""


def reader(folder: Path, two_level: bool, ranks: int) -> EngineReader:
    """As targets `ascend` and `vllm-ascend` open a folder; split experts of two levels as 0.11.0 reads them."""
    return open_reader("vllm-ascend-per-group" if two_level else "vllm-ascend", folder, ranks)


def differences(model: nn.Module, graph: GraphParts, folder: Path, place: Place, dtype: torch.dtype) -> Iterator[str]:
    """A sentence for every linear, and every projection of an expert, that the reader reads otherwise."""
    two_level = any(recipe.int4 and recipe.group_size for recipe in graph.program.recipes.values())
    linears = reader(folder, two_level, place.ranks)
    experts = reader(folder, two_level, 1) if place.expert_parallel else linears
    draw = torch.Generator().manual_seed(place.rank)
    for name, layer in model.named_modules():
        path = name.removesuffix(".routed_experts")
        try:
            if hasattr(layer, "w13_weight"):
                yield from _experts(path, layer, graph, experts, place, dtype, draw)
            elif isinstance(getattr(layer, "weight", None), Tensor) and path.rpartition(".")[2] in LINEARS:
                want = expected_linear(path, graph, place)
                if want.kind not in (FLOAT, "W4A8_DYNAMIC"):  # of int4 linears readers read experts alone
                    x = computed.draw_rows((computed.ROWS, want.codes.shape[1]), dtype, draw)
                    yield from _linear(path, layer, linears, place, x)
        except FxquantError as error:
            yield f"{path}: the reader refuses: {error.fact}"


def _linear(path: str, layer: Any, opened: EngineReader, place: Place, x: Tensor) -> Iterator[str]:
    parent, _, last = path.rpartition(".")
    npu_operators.CALLS.clear()
    result, begin = layer.quant_method.apply(layer, x.clone()), 0
    x8, x_scale = npu_operators.CALLS[0].result, None
    if isinstance(x8, tuple):
        x8, x_scale = x8
    for member in FUSED.get(last, (last,)):
        loaded: Any = opened.linear(f"{parent}.{member}", last in ROW_PARALLEL)
        if isinstance(loaded, MixedLinear) and x_scale is None:
            loaded = loaded.decode
        shard = loaded.shards[place.rank if len(loaded.shards) > 1 else 0]
        end = begin + len(shard.codes())
        held = layer.weight.data.T[begin:end].to(torch.int32)
        codes, scale = loaded.activation.quantize(x.float(), Arithmetic.KERNEL)
        if not torch.equal(codes, x8):
            yield f"{path}: the reader quantizes the input otherwise"
        if not torch.equal(shard.codes(), held):
            yield f"{path}: the reader has other codes of {member}"
        elif not torch.equal(shard.kernel(x8, scale).to(result.dtype), result[..., begin:end]):
            yield f"{path}: the reader computes otherwise with {member}"
        begin = end


def _experts(
    path: str, layer: Any, graph: GraphParts, opened: EngineReader, place: Place, dtype: torch.dtype,
    draw: torch.Generator,
) -> Iterator[str]:  # fmt: skip
    w13, w2 = expected_experts(path, graph, place)
    if w13[0].kind == FLOAT:
        return
    products = computed.run_experts(layer, computed.draw_rows((2 * len(w13), w13[0].codes.shape[1]), dtype, draw))
    first, rank = (place.rank * len(w13), 0) if place.expert_parallel else (0, place.rank)
    for expert in range(len(w13)):
        rows = slice(2 * expert, 2 * expert + 2)
        for members, call in zip((("gate_proj", "up_proj"), ("down_proj",)), products, strict=True):
            begin = 0
            for member in members:
                loaded: Any = opened.expert_linear(f"{path}.{first + expert}.{member}", member == "down_proj")
                shard = loaded.shards[rank]
                end = begin + len(shard.codes())
                result = call.result[0][rows, begin:end]
                x8, x_scale = call.given["x"][0][rows], call.given["per_token_scale"][0][rows].unsqueeze(-1)
                yield from _expert(f"{path}.{first + expert}.{member}", shard, x8, x_scale, result)
                begin = end


def _expert(path: str, shard: Any, x8: Tensor, x_scale: Tensor, result: Tensor) -> Iterator[str]:
    ours = shard.kernel(x8, x_scale)
    if not hasattr(shard, "layout"):
        if not torch.equal(ours.to(result.dtype), result):
            yield f"{path}: the reader computes otherwise"
        return
    # the reader rounds as the device does, our operator adds groups in float32 with all bits of the scales
    scale = shard.layout.combined(shard.part).double()
    codes = shard.layout.codes(shard.part).double().abs()
    high, low = (part.abs() for part in nibbles(x8))
    by_group = (codes.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)
    magnitude = (16 * high + low) @ by_group.T
    bound = (FP19 + (scale.shape[1] + 1) * FP16) * magnitude * x_scale.double()
    bound = bound + 2 * half_step((ours.abs() + bound).float(), result.dtype)
    if not ((ours.double() - result.double()).abs() <= bound).all():
        yield f"{path}: the reader's result is out of bounds"
