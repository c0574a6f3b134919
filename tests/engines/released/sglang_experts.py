"""What a loaded SGLang holds of routed experts on one rank, and what its experts return."""

from typing import Any

import torch
from sglang_linears import Rank
from sglang_operators import Product
from torch import Tensor

from fxquant.engine_readers.arithmetic import U, half_step
from fxquant.engine_readers.int8_shards import PerTokenShard
from fxquant.engine_readers.packed_shard import PackedShard
from fxquant.errors import FxquantError
from fxquant.lowering.ascend.operators.grouped_matmul import unpack_int4

GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)
MEMBERS = {"w13": GATE_UP, "w2": DOWN}
ROWS = 2
"""Tokens of each expert."""


def check_experts(rank: Rank, name: str, layer: Any) -> None:
    """All experts of a layer that this rank has."""
    count = layer.num_local_experts
    first = rank.place.rank * count if rank.place.whole else 0
    paths = [f"{rank.members(name)[0]}.{first + index}" for index in range(count)]
    rank.seen.update(f"{path}.{projection}" for path in paths for projection in (*GATE_UP, *DOWN))
    products = _run(rank, layer, count)
    for half, product in zip(MEMBERS, products, strict=True):
        for index, path in enumerate(paths):
            members = [f"{path}.{projection}" for projection in MEMBERS[half]]
            _check_half(rank, layer, half, index, members)
            rows = slice(index * ROWS, (index + 1) * ROWS)
            _check_product(rank, half, members, product, rows)


def _run(rank: Rank, layer: Any, count: int) -> list[Product]:
    """The two grouped matmuls, by the engine's own code behind the dispatch of tokens."""
    generator = torch.Generator().manual_seed(0)
    width = layer.hidden_size
    x8 = torch.randint(-127, 128, (count * ROWS, width), generator=generator, dtype=torch.int8)
    x_scale = torch.rand(count * ROWS, generator=generator) / 127
    counts = torch.full((count,), ROWS, dtype=torch.int64)
    rank.operators.taken()
    if hasattr(layer.quant_method, "apply_without_routing_weights"):
        layer.quant_method.apply_without_routing_weights(layer, x8, x_scale, 1, counts, rank.dtype)
    else:  # 0.5.23: one kernel for each half
        gate_up = layer.w13_kernel.apply(layer, x8, counts, x_scale, rank.dtype, "w13", 1)
        activated = torch.ops.npu.npu_swiglu(gate_up)
        layer.w2_kernel.apply(layer, *_quantized(activated, counts), rank.dtype, "w2", 1)
    return rank.operators.taken()


def _quantized(activated: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x8, x_scale = torch.ops.npu.npu_dynamic_quant(activated)
    return x8, counts, x_scale


def _check_half(rank: Rank, layer: Any, half: str, index: int, members: list[str]) -> None:
    """w13 or w2 of one expert, as held."""
    weight, scale = getattr(layer, f"{half}_weight")[index], getattr(layer, f"{half}_weight_scale")[index]
    int4 = weight.dtype is torch.int32
    codes = unpack_int4(weight) if int4 else weight
    rank.by_graph.equal(f"{members[0]} codes", codes.T.double(), _codes(rank, half, members))
    if rank.experts is None:
        return
    try:
        emulated: list[Any] = [rank.experts.expert_linear(member, half == "w2") for member in members]
    except FxquantError:
        return
    shards = [linear.shards[rank.place.rank if len(linear.shards) > 1 else 0] for linear in emulated]
    by, place = rank.by_emulation, f"{members[0]} as {half}"
    if int4:
        assert isinstance(shards[0], PackedShard)
        layout = shards[0].layout
        by.equal(f"{place}: words", weight.data, layout.words)
        by.equal(f"{place}: scale", scale.data, layout.scale)
        by.equal(f"{place}: scale_bias", getattr(layer, f"{half}_scale_bias")[index].data, layout.scale_bias)
        return
    assert isinstance(shards[0], PerTokenShard)
    by.equal(f"{place}: weight", weight.data, torch.cat([shard.weight for shard in shards], 1))
    expected = torch.cat([shard.weight_scale for shard in shards])
    by.equal(f"{place}: scale", scale.data.to(expected.dtype), expected)


def _codes(rank: Rank, half: str, members: list[str]) -> Tensor:
    """float64 [n, k] of this rank."""
    codes = [rank.graph.codes(member) for member in members]
    if rank.place.whole:
        return torch.cat(codes)
    return torch.cat([rank.part(rank.part(code, DOWN[0] if half == "w2" else ""), DOWN[0] if half == "w2" else "", 1)
                      for code in codes])  # fmt: skip


def _check_product(rank: Rank, half: str, members: list[str], product: Product, rows: slice) -> None:
    codes = _codes(rank, half, members)
    sums = product.x8[rows].double() @ codes.T
    if product.result.dtype is torch.int32:
        rank.by_graph.equal(f"{members[0]} sums", product.result[rows].double(), sums)
        return
    assert product.x_scale is not None
    tokens = product.x_scale[rows].double().unsqueeze(-1)
    scales = [rank.graph.scale(member) for member in members]
    if half == "w13" and not rank.place.whole:
        scales = [scale.chunk(rank.place.size)[rank.place.rank] for scale in scales]
    scale = torch.cat(scales)
    if rank.graph.recipes[members[0]].int4:
        # nibbles: x - 8 is multiplied, 8 Σ codes is stored in up to 16 columns; some ten roundings of float32
        magnitude = (product.x8[rows].double().abs() + 16) @ codes.abs().T
        off = 16 * U * magnitude * scale.double()
    else:
        off = sums.abs() * half_step(scale, torch.bfloat16) + 4 * U * sums.abs() * scale.double()
    rank.by_graph.within(f"{members[0]} on rank {rank.place.rank}", product.result[rows],
                         sums * scale.double() * tokens, off * tokens)  # fmt: skip
