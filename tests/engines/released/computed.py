"""What a released vllm-ascend computes on one rank, on our reference operators, against the graph's formula.

The integers of the activations are taken from the engine's own calls. They must be the graph's; by the static scheme
they may be one off, where the engine multiplies by a reciprocal rounded to the model's dtype. On these integers the
graph's result is formed in float64, and every rounding of the engine's is counted.
"""

from collections.abc import Iterator
from typing import Any

import npu_operators
import torch
from graph_parts import FLOAT, GraphParts, Part
from held import LINEARS, ROW_PARALLEL, U, combined_scale, expected_experts, expected_linear
from torch import Tensor, nn
from vllm_ascend_engine import first_of
from vllm_world import Place

from fxquant import ops
from fxquant.engine_readers.arithmetic import half_step
from fxquant.ops.quantized import decode_deq_scale

ROWS = 3


def differences(model: nn.Module, graph: GraphParts, place: Place, dtype: torch.dtype) -> Iterator[str]:
    """A sentence for every quantized linear, and every layer of experts, whose result is further off than its bound."""
    draw = torch.Generator().manual_seed(place.rank)
    for name, layer in model.named_modules():
        path = name.replace(".mtp_block.", ".").removesuffix(".routed_experts")
        if hasattr(layer, "w13_weight"):
            yield from _experts(path, layer, graph, place, dtype, draw)
        elif isinstance(getattr(layer, "weight", None), Tensor) and path.rpartition(".")[2] in LINEARS:
            want = expected_linear(path, graph, place)
            if want.kind != FLOAT:
                yield from _linear(path, layer, want, place, draw_rows((ROWS, want.codes.shape[1]), dtype, draw))


def draw_rows(shape: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator) -> Tensor:
    """Activations, as the model's dtype has them."""
    return torch.randn(shape, generator=draw).to(dtype)


def _linear(path: str, layer: Any, want: Part, place: Place, x: Tensor) -> Iterator[str]:
    """Mixed linears both ways: dynamic in prefill, static where the engine decodes only."""
    if want.kind != "W8A8_MIX":
        yield from _one_way(path, layer, want, place, x, want.kind)
        return
    for consumer, kind in ((False, "W8A8_DYNAMIC"), (True, "W8A8")):
        layer.is_kv_consumer = consumer
        yield from _one_way(f"{path} ({'decode' if consumer else 'prefill'})", layer, want, place, x, kind)


def _one_way(path: str, layer: Any, want: Part, place: Place, x: Tensor, kind: str) -> Iterator[str]:
    npu_operators.CALLS.clear()
    result = layer.quant_method.apply(layer, x.clone())
    if kind == "W4A8_DYNAMIC":
        yield from _weight_only(path, want, x, result)
        return
    quantize, product = npu_operators.CALLS
    assert want.scale is not None
    if kind == "W8A8":
        x8, row_parallel = quantize.result, path.partition(" ")[0].rpartition(".")[2] in ROW_PARALLEL
        yield from _off_by_one(path, x8, x, want)
        exact = _sums(x8, want)
        if not row_parallel or place.rank == 0:
            exact = exact + want.tensors["quant_bias"].double()
        exact = exact * decode_deq_scale(want.tensors["deq_scale"]).double()
        bound = 4 * U * exact.abs()
    else:
        x8, x_scale = quantize.result
        codes, scale = ops.quantize_per_token(x.float())
        if not (torch.equal(x8, codes) and torch.equal(x_scale, scale.squeeze(-1))):
            yield f"{path}: activations are not the graph's"
        acc = _sums(x8, want) * x_scale.double().unsqueeze(-1)
        exact = acc * want.scale.double()
        bound = acc.abs() * half_step(want.scale, layer.weight_scale.dtype) + 4 * U * exact.abs()
    yield from _outside(path, result, exact, bound)


def _sums(x8: Tensor, want: Part) -> Tensor:
    return x8.double() @ want.codes.double().T


def _off_by_one(path: str, x8: Tensor, x: Tensor, want: Part) -> Iterator[str]:
    """`|x / scale| <= 255` where it is not clamped, and the reciprocal is within 2**-8: off by less than one step."""
    scale, offset = want.tensors["input_scale"].float()[:1], want.tensors["input_offset"].float()[:1]
    codes = ops.quantize_static(x.float(), scale, offset)
    off = int((x8.int() - codes.int()).abs().max())
    if off > 1:
        yield f"{path}: activations are {off} steps off the graph's"


def _weight_only(path: str, want: Part, x: Tensor, result: Tensor) -> Iterator[str]:
    """The engine leaves x float, the graph rounds it: half a step of each input, and roundings of weight and result."""
    assert want.scale is not None and want.second is not None
    weight = want.codes.double() * want.scale.double().unsqueeze(1)
    exact = x.double() @ weight.T
    unit = 4 * float(half_step(torch.tensor(1.0 + U), x.dtype) or 2.0**-8)
    step = x.double().abs().amax(-1, keepdim=True) / 127 / 2
    bound = step * weight.abs().sum(1) + unit * (x.double().abs() @ weight.abs().T)
    yield from _outside(path, result, exact, bound)


def _outside(path: str, result: Tensor, exact: Tensor, bound: Tensor) -> Iterator[str]:
    """`bound`, and one rounding to the result's dtype of anything within it."""
    allowed = bound + half_step((exact.abs() + bound).float(), result.dtype) + half_step(exact.float(), result.dtype)
    error = (result.double() - exact).abs()
    if not (error <= allowed).all():  # true for NaN
        relative = float(error.max() / exact.abs().max())
        yield f"{path}: result off by {relative:.2g} of the largest value"


def _experts(
    path: str, layer: Any, graph: GraphParts, place: Place, dtype: torch.dtype, draw: torch.Generator
) -> Iterator[str]:
    """Two rows for every expert of the rank."""
    w13, w2 = expected_experts(path, graph, place)
    if w13[0].kind == FLOAT:
        return
    products = run_experts(layer, draw_rows((2 * len(w13), w13[0].codes.shape[1]), dtype, draw))
    for name, call, parts in zip(("w13", "w2"), products, (w13, w2), strict=True):
        given, scales = call.given["x"][0], call.given["per_token_scale"][0]
        for expert, want in enumerate(parts):
            rows = slice(2 * expert, 2 * expert + 2)
            exact, bound = _expert(given[rows], scales[rows], want, getattr(layer, f"{name}_weight_scale").dtype)
            yield from _outside(f"{path}.{expert}.{name}", call.result[0][rows], exact, bound)


def _expert(x8: Tensor, x_scale: Tensor, want: Part, held: torch.dtype) -> tuple[Tensor, Tensor]:
    """The graph's product in float64, and how far the engine's may be from it."""
    assert want.scale is not None
    scale, by_token = want.scale.double(), x_scale.double().unsqueeze(-1)
    exact = _sums(x8, want) * scale * by_token
    if want.kind == "W8A8_DYNAMIC":
        return exact, (_sums(x8, want) * by_token).abs() * half_step(want.scale, held) + 4 * U * exact.abs()
    groups = 1 if want.second is None else want.second.shape[1]
    # the operator multiplies x - 8, with the combined scales; scale_bias adds the 8 again, with the channel's scale
    shifted = torch.einsum(
        "mgk,ngk->mng", x8.double().unflatten(1, (groups, -1)) - 8, want.codes.double().unflatten(1, (groups, -1))
    )
    steps = torch.ones(len(scale), 1).double() if want.second is None else want.second.double()
    off = (combined_scale(want).double() / (steps * scale.unsqueeze(1)) - 1).abs() * scale.unsqueeze(1)
    eights = 8 * want.codes.double().sum(1)
    narrow = want.scale if want.second is None else want.scale.bfloat16()
    bound = (shifted.abs() * off).sum(-1) + (eights * (narrow.double() - scale)).abs()
    magnitude = ((x8.double().abs() + 16) @ want.codes.double().abs().T) * scale
    return exact, (bound + (2 * groups + 40) * U * magnitude) * by_token


def run_experts(layer: Any, x: Tensor) -> list[npu_operators.Call]:
    """The engine's function for experts, with what its scheme's `apply` hands it, two rows an expert: both products."""
    x8, x_scale = ops.quantize_per_token(x.float())
    module = first_of(("vllm_ascend.ops.fused_moe.moe_mlp", "vllm_ascend.ops.moe.moe_mlp"))
    module.dispose_tensor = lambda tensor: None  # its inputs are looked at afterwards
    as_list = not module.__name__.startswith("vllm_ascend.ops.moe.")
    int4 = layer.w13_weight.dtype is torch.int32
    given = {"w1": layer.w13_weight, "w2": layer.w2_weight, "w2_scale": layer.w2_weight_scale}
    given["w1_scale"] = layer.w13_weight_scale if int4 else layer.w13_weight_scale_fp32
    if as_list:
        given = {name: [value.data] for name, value in given.items()}
    listed = as_list and "use_w4a8_per_channel_gmm_swiglu" in module.quant_apply_mlp.__annotations__
    if int4:
        biases = {"w1_scale_bias": layer.w13_scale_bias.data, "w2_scale_bias": layer.w2_scale_bias.data}
        given |= {name: [value] for name, value in biases.items()} if listed else biases
    if listed and int4 and layer.w13_weight_scale.dim() == 2:  # per channel: an operator of the plugin's own
        given["use_w4a8_per_channel_gmm_swiglu"] = True
        module.enable_custom_op = lambda: True
        torch.ops._C_ascend.grouped_matmul_swiglu_quant_v2 = npu_operators.swiglu_quant
    counts = torch.full((len(layer.w13_weight),), 2)
    npu_operators.CALLS.clear()
    module.quant_apply_mlp(x8, group_list=counts, group_list_type=1, dynamic_scale=x_scale.squeeze(-1), **given)
    return [call for call in npu_operators.CALLS if call.name == "npu_grouped_matmul"]
