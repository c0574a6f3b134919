"""What a loaded SGLang holds of linears on one rank, and what its `apply` returns."""

from dataclasses import dataclass, field
from typing import Any

import torch
from comparison import Comparison, Graph
from sglang_engine import Place
from sglang_operators import NpuOperators
from torch import Tensor

from fxquant.engine_readers import Arithmetic, EngineReader
from fxquant.engine_readers.activation import PerTensor
from fxquant.engine_readers.arithmetic import U, half_step
from fxquant.engine_readers.int8_shards import StaticShard
from fxquant.engine_readers.ranks import Ranks
from fxquant.errors import FxquantError

FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
WHOLE = ("fused_qkv_a_proj_with_mqa",)
"""On every rank."""
ROW_PARALLEL = ("o_proj", "down_proj")
TOKENS = 3


@dataclass
class Rank:
    """One rank of an engine in comparison with the graph, and with the emulation that `reader` and `experts` are.

    draft     checkpoint path of the multi-token-prediction layer in the engine's hands, "" for the model
    reader    none if the emulation refuses the folder
    seen      modules of the graph that the engine holds as quantized
    """

    place: Place
    graph: Graph
    reader: EngineReader | None
    experts: EngineReader | None
    operators: NpuOperators
    dtype: torch.dtype
    draft: str = ""
    by_graph: Comparison = field(default_factory=Comparison)
    by_emulation: Comparison = field(default_factory=Comparison)
    seen: set[str] = field(default_factory=set)

    def members(self, name: str) -> list[str]:
        """Checkpoint paths of the linears that the engine holds under `name`."""
        if self.draft:
            name = name.replace("model.decoder", self.draft)
        parent, _, last = name.rpartition(".")
        return [f"{parent}.{member}" for member in FUSED.get(last, (last,))]

    def stored(self, name: str) -> str:
        """The checkpoint's name of a parameter."""
        if self.draft and name.startswith(("model.decoder.", "model.eh_proj", "model.enorm", "model.hnorm")):
            return name.replace("model.decoder" if "decoder" in name else "model", self.draft, 1)
        return name.replace("model.shared_head", f"{self.draft}.shared_head") if self.draft else name

    def part(self, whole: Tensor, name: str, axis: int = 0) -> Tensor:
        """This rank's rows of a tensor [n, …] of linear `name`, or with axis 1 its columns; all where it is whole."""
        last = name.rpartition(".")[2]
        split = last not in WHOLE and (axis == 1) == (last in ROW_PARALLEL)
        return whole.chunk(self.place.size, axis)[self.place.rank] if split else whole


def check_linear(rank: Rank, name: str, layer: Any) -> None:
    """A quantized linear, fused or not."""
    members, row_parallel = rank.members(name), name.endswith(ROW_PARALLEL)
    rank.seen.update(members)
    emulated = _emulated(rank, members, row_parallel)
    known = [member for member in members if member in rank.graph.recipes]
    if len(known) != len(members):
        rank.by_graph.differences.append(f"{name}: read as quantized, but is float")
        return
    codes = [rank.part(rank.part(rank.graph.codes(member), name), name, 1) for member in members]
    rank.by_graph.equal(name, layer.weight.T.double(), torch.cat(codes))
    _check_parameters(rank, name, layer, members)
    x = torch.randn(TOKENS, layer.weight.shape[0], generator=torch.Generator().manual_seed(0)).to(rank.dtype)
    if emulated:
        _check_emulated(rank, name, layer, emulated, x)
    _check_product(rank, name, layer, x, members, torch.cat(codes))


def _check_parameters(rank: Rank, name: str, layer: Any, members: list[str]) -> None:
    """Of a static linear: per output those of all members, and the one scale and offset of its input."""
    if rank.graph.quant_bias(members[0]) is None:
        return
    read = rank.graph.files.read
    for suffix in ("deq_scale", "quant_bias"):
        whole = [rank.part(read(f"{member}.{suffix}"), name) for member in members]
        rank.by_graph.equal(f"{name}.{suffix}", getattr(layer, suffix).data, torch.cat(whole))
    for suffix in ("input_scale", "input_offset"):
        stored = read(f"{members[0]}.{suffix}").to(rank.dtype)
        rank.by_graph.equal(f"{name}.{suffix}", getattr(layer, suffix).data, stored)


def _emulated(rank: Rank, members: list[str], row_parallel: bool) -> list[Any]:
    """The emulation's linears; none if it refuses."""
    if rank.reader is None:
        return []
    try:
        rank.reader.check_fused(tuple(members))
        return [rank.reader.linear(member, row_parallel) for member in members]
    except FxquantError:
        return []


def _check_emulated(rank: Rank, name: str, layer: Any, emulated: list[Any], x: Tensor) -> None:
    shards: list[Any] = []
    for linear in emulated:
        assert isinstance(linear, Ranks), name
        whole = name.endswith(WHOLE) or len(linear.shards) == 1
        shards += linear.shards if whole else [linear.shards[rank.place.rank]]
    by = rank.by_emulation
    by.equal(f"{name}.weight", layer.weight.data, torch.cat([shard.weight for shard in shards], 1))
    if isinstance(shards[0], StaticShard):
        by.equal(f"{name}.deq_scale", layer.deq_scale.data, torch.cat([shard.deq_scale for shard in shards]))
        if shards[0].quant_bias is not None:
            by.equal(f"{name}.quant_bias", layer.quant_bias.data, torch.cat([shard.quant_bias for shard in shards]))
        activation = emulated[0].activation
        assert isinstance(activation, PerTensor)
        by.equal(f"{name}.input_scale", layer.input_scale.data, activation.scale)
        by.equal(f"{name}.input_offset", layer.input_offset.data, activation.offset)
    else:
        by.equal(f"{name}.weight_scale", layer.weight_scale.data, torch.cat([shard.weight_scale for shard in shards]))
    rank.operators.taken()
    layer.quant_method.apply(layer, x, None)
    product = rank.operators.taken()[-1]
    x8, _ = emulated[0].activation.quantize(x.float(), Arithmetic.KERNEL)
    by.equal(f"{name}: its integers", product.x8, x8)


def _check_product(rank: Rank, name: str, layer: Any, x: Tensor, members: list[str], codes: Tensor) -> None:
    """`(x8 @ codes + quant_bias) * scale * x_scale`; scales of dynamic linears are held in the model's dtype."""
    rank.operators.taken()
    layer.quant_method.apply(layer, x, None)
    product = rank.operators.taken()[-1]
    scale = torch.cat([rank.part(rank.graph.scale(member), name) for member in members])
    sums = product.x8.double() @ codes.T
    biases = [rank.graph.quant_bias(member) for member in members]
    added = [rank.part(bias, name) for bias in biases if bias is not None]
    if added and not (name.endswith(ROW_PARALLEL) and rank.place.rank):  # results of row-parallel ranks are summed
        sums = sums + torch.cat(added)
    tokens = torch.ones(1, 1) if product.x_scale is None else product.x_scale.unsqueeze(-1)
    off = torch.zeros(1) if added else half_step(scale, rank.dtype)
    expected = sums * scale.double() * tokens.double()
    bound = sums.abs() * off.double() * tokens.double() + 4 * U * expected.abs()
    if not added and rank.graph.recipes[members[0]].bias and not rank.place.rank:
        expected = expected + torch.cat([rank.part(rank.graph.files.read(f"{m}.bias"), name) for m in members])
    rank.by_graph.within(name, product.result, expected, bound)
