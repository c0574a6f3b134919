"""What a released vllm-ascend holds on one rank after loading, against the graph: integers and scales by `==`."""

from collections.abc import Iterator

import torch
from graph_parts import FLOAT, GraphParts, NotDivisibleError, Part, stacked
from torch import Tensor, nn
from vllm_world import Place

from fxquant.lowering.ascend.operators.grouped_matmul import unpack_int4
from fxquant.ops.quantized import decode_deq_scale

FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
REPLICATED = ("fused_qkv_a_proj", "q_a_proj", "kv_a_proj_with_mqa", "gate", "eh_proj")
ROW_PARALLEL = ("o_proj", "down_proj")
U = 2.0**-24


def differences(model: nn.Module, graph: GraphParts, place: Place) -> Iterator[str]:
    """A sentence for every linear and float tensor of which the engine holds something else."""
    drafts = [name.partition(".mtp_block")[0] for name, _ in model.named_modules() if ".mtp_block" in name]
    for name, layer in model.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        path = name.replace(".mtp_block.", ".")
        if drafts and path == "model.embed_tokens":  # one for all draft layers
            path = f"{drafts[-1]}.embed_tokens"
        try:
            if "w13_weight" in own:
                yield from _experts(path.removesuffix(".routed_experts"), layer, graph, place)
            elif isinstance(getattr(layer, "weight", None), Tensor) and _last(path) in LINEARS:
                yield from _linear(path, layer, expected_linear(path, graph, place), graph.program.dtype)
            else:
                yield from _floats(path, own, graph, place)
        except NotDivisibleError as error:
            yield f"{path}: {error}"


def expected_linear(path: str, graph: GraphParts, place: Place) -> Part:
    """The rank's part of a linear that may be several of the folder's."""
    parent, _, last = path.rpartition(".")
    parts = [graph.linear(f"{parent}.{member}") for member in FUSED.get(last, (last,))]
    if last in REPLICATED:
        return stacked(parts)
    if last in ROW_PARALLEL:
        return parts[0].columns(place.rank, place.ranks)
    return stacked([part.rows(_share(len(part.codes), place)) for part in parts])


LINEARS = {"q_proj", "q_b_proj", "kv_b_proj", *REPLICATED, *ROW_PARALLEL, *FUSED}


def expected_experts(path: str, graph: GraphParts, place: Place) -> tuple[list[Part], list[Part]]:
    """w13 and w2 of the experts that a rank has."""
    count = int(graph.program.config["n_routed_experts"])
    everyone = range(count)
    mine = everyone[_share(count, place)] if place.expert_parallel else everyone
    whole = Place(1, 0) if place.expert_parallel else place
    w13, w2 = [], []
    for expert in mine:
        gate, up, down = (graph.linear(f"{path}.{expert}.{name}_proj") for name in ("gate", "up", "down"))
        w13.append(stacked([part.rows(_share(len(part.codes), whole)) for part in (gate, up)]))
        w2.append(down.columns(whole.rank, whole.ranks))
    return w13, w2


def _share(size: int, place: Place) -> slice:
    share = size // place.ranks
    return slice(place.rank * share, (place.rank + 1) * share)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _linear(path: str, layer: nn.Module, want: Part, dtype: torch.dtype) -> Iterator[str]:
    held = layer.weight.data
    if want.kind == FLOAT:
        yield from _unequal(f"{path}.weight", held, want.codes.to(held.dtype))
        return
    if want.kind == "W4A8_DYNAMIC":
        yield from _int4(path, held, layer.weight_scale_second.data.T, want, dtype)
        return
    yield from _unequal(f"{path}.weight", held.T.to(torch.int32), want.codes)
    if want.kind != "W8A8":
        yield from _unequal(f"{path}.weight_scale", layer.weight_scale.flatten(), _narrow(want, layer.weight_scale))
    for role in ("deq_scale", "quant_bias", "input_scale", "input_offset") if want.kind != "W8A8_DYNAMIC" else ():
        value = getattr(layer, role).data
        yield from _unequal(f"{path}.{role}", value, want.tensors[role].to(value.dtype))


def _narrow(want: Part, held: Tensor) -> Tensor:
    assert want.scale is not None
    return want.scale.to(held.dtype)


def _int4(path: str, held: Tensor, combined: Tensor, want: Part, dtype: torch.dtype) -> Iterator[str]:
    """An int4 linear outside the experts: combined scales [n, G] in the model's dtype."""
    assert want.scale is not None and want.second is not None
    yield from _unequal(f"{path}.weight", unpack_int4(held).T.to(torch.int32), _int4_codes(want))
    scale = want.scale.to(dtype).float().unsqueeze(1) * want.second.to(dtype)
    yield from _unequal(f"{path}: combined scale", combined, scale.to(combined.dtype))


def _int4_codes(want: Part) -> Tensor:
    """Codes without their second scale."""
    if want.second is None:
        return want.codes
    return want.codes // want.second.to(torch.int32).repeat_interleave(want.codes.shape[1] // want.second.shape[1], 1)


def _experts(path: str, layer: nn.Module, graph: GraphParts, place: Place) -> Iterator[str]:
    for name, parts in zip(("w13", "w2"), expected_experts(path, graph, place), strict=True):
        weight = getattr(layer, f"{name}_weight").data
        if len(weight) != len(parts):
            yield f"{path}.{name}: {len(weight)} experts, the graph has {len(parts)} for this rank"
            continue
        for expert, want in enumerate(parts):
            yield from _expert(f"{path}.{expert}.{name}", weight[expert], layer, name, expert, want)


def _expert(path: str, weight: Tensor, layer: nn.Module, name: str, expert: int, want: Part) -> Iterator[str]:
    if want.kind == FLOAT:
        held = weight.T if weight.shape != want.codes.shape or weight.shape[0] == weight.shape[1] else weight
        yield from _unequal(path, held, want.codes.to(held.dtype))
        return
    scale = getattr(layer, f"{name}_weight_scale").data[expert]
    if want.kind == "W8A8_DYNAMIC":
        yield from _unequal(path, weight.T.to(torch.int32), want.codes)
        yield from _unequal(f"{path} scale", scale.flatten(), _narrow(want, scale))
        return
    yield from _unequal(path, unpack_int4(weight).T.to(torch.int32), _int4_codes(want))
    yield from _unequal(f"{path} scale", decode_deq_scale(scale.reshape(-1, len(want.codes))).T, combined_scale(want))
    yield from _scale_bias(path, getattr(layer, f"{name}_scale_bias").data[expert], want)


def combined_scale(want: Part) -> Tensor:
    """float32 [n, G]: of two levels rounded to float16, of one as it is."""
    assert want.scale is not None
    if want.second is None:
        return want.scale.unsqueeze(1)
    return (want.scale.unsqueeze(1) * want.second).to(torch.float16).float()


def _scale_bias(path: str, held: Tensor, want: Part) -> Iterator[str]:
    """`8 * scale * Σ codes` over the rank's k: each stored column and each of their sums is rounded to float32 once.

    Two levels: made of the scale rounded to bfloat16.
    """
    assert want.scale is not None
    scale = (want.scale if want.second is None else want.scale.bfloat16()).double()
    columns = want.tensors["scale_bias"].shape[1]
    sums = want.codes.double().unflatten(1, (columns, -1)).sum(-1)
    exact = 8 * scale * sums.sum(1)
    bound = 2 * columns * U * 8 * scale * sums.abs().sum(1)
    wrong = ~((held.double() - exact).abs() <= bound)  # true for NaN
    if wrong.any():
        row = int(wrong.nonzero()[0])
        yield f"{path} scale_bias: {held[row]:.6g} for output {row}, 8 Σ w is {exact[row]:.6g}"


def _floats(path: str, own: dict[str, nn.Parameter], graph: GraphParts, place: Place) -> Iterator[str]:
    """Norms, embeddings, the head and the router's bias; a vocabulary is dealt out over the ranks."""
    for role, parameter in own.items():
        stored = graph.stored(f"{path}.{role}" if path else role)
        if stored is None and _last(path) != "attention":
            yield f"{path}.{role}: not in the folder"
        elif stored is not None:
            shared = stored if stored.shape == parameter.shape else stored[_share(len(stored), place)]
            yield from _unequal(f"{path}.{role}", parameter.data, shared.to(parameter.dtype))


def _unequal(name: str, held: Tensor, want: Tensor) -> Iterator[str]:
    if held.shape != want.shape:
        yield f"{name}: {list(held.shape)}, the graph has {list(want.shape)}"
    elif not torch.equal(held, want):
        share = float((held != want).double().mean())
        yield f"{name}: {share:.0%} of it differs"
