"""Whole models through ONNX Runtime and through the fx graph, by operator and end to end."""

import functools
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx_calls import UNIT, floats, integers, is_tensor, matmul_bound
from safetensors.torch import save_file
from tiny import float_program, meta_model, random_ids
from torch import Tensor, fx

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import AccuracyLevel, OnnxProfile
from fxquant.lowering.convert import reformed
from fxquant.lowering.onnx import write_onnx
from fxquant.lowering.onnx.deployment import deployment
from fxquant.lowering.onnx.extract import operator_session
from fxquant.lowering.onnx.last_logits import KEEP_ALL
from fxquant.lowering.onnx.runner import OnnxRunner
from fxquant.lowering.output_folder.stacks import stacked_experts, stacks_of
from fxquant.models import DecoderLayer
from fxquant.passes import AssignSchemes, Calibrate, pipeline, run_passes
from fxquant.policy.policy import load_policy
from fxquant.program.program import Program
from fxquant.runtime.execute import cache_shape, call, execute, prefill_inputs
from fxquant.runtime.weight_providers import Cached, RecipeWeights, load
from fxquant.schemes.weight_formats import WeightFormat
from fxquant.storage.safetensors import read_header

ATEN = torch.ops.aten
INTEGER = OnnxForm(OnnxProfile.INTEGER)
SUMS = {profile: OnnxForm(profile, accuracy_level=AccuracyLevel.FLOAT) for profile in OnnxProfile}
"""A form of each profile that rounds as its deployed program does: they differ by the order of float sums alone."""


@dataclass(frozen=True)
class Emitted:
    """A deployed program, its weights as they are stored, and the folder with both."""

    program: Program
    read: Cached
    folder: Path

    @functools.cached_property
    def runner(self) -> OnnxRunner:
        return OnnxRunner(self.folder)


def quantized(checkpoint: Checkpoint, policy: str, layer: type[DecoderLayer] = DecoderLayer) -> Program:
    program, loaded = float_program(checkpoint, layer), load_policy(policy)
    ids = [random_ids(meta_model(checkpoint), 2, 16, seed) for seed in range(2)]
    run_passes(program, pipeline(AssignSchemes(loaded), Calibrate(loaded, checkpoint, lambda: ids)))
    return program


def emit(program: Program, checkpoint: Checkpoint, folder: Path, form: OnnxForm = INTEGER) -> Emitted:
    """Two weight files and the model; a stored tensor of odd length moves some offsets off alignment."""
    if form.profile.contrib:
        program = reformed(program, WeightFormat.BLOCKS)
    read = RecipeWeights(program, checkpoint)
    tensors, whole = {}, _stored(program, read)
    for file in range(2):
        odd = {"odd": torch.zeros(13, dtype=torch.int8)}
        save_file({name: whole[name] for name in sorted(whole)[file::2]} | odd, folder / f"weights-{file}.safetensors")
        tensors |= read_header(folder / f"weights-{file}.safetensors")
    write_onnx(program, tensors, folder, form)
    return Emitted(deployment(program, form).program, Cached(read), folder)


def _stored(program: Program, read: RecipeWeights) -> dict[str, Tensor]:
    """Every tensor of the weight files; experts in stacks lie there alone."""
    names = {name for parameter in program.parameters.values() for name in parameter.names}
    tensors = {name: read(name).contiguous() for name in names}
    for stack in (stack for experts in stacked_experts(program) for stack in stacks_of(experts)):
        data = torch.empty(stack.spec.nbytes, dtype=torch.uint8)
        for part in stack.slices:
            own, done = tensors.pop(part.name).view(torch.uint8).flatten(), 0
            for start, size in part.runs.ranges(0, part.spec.nbytes):
                data[start : start + size], done = own[done : done + size], done + size
        tensors[stack.name] = data.view(stack.spec.dtype).view(stack.spec.shape)
    return tensors


def cached_inputs(program: Program, seed: int = 0) -> list[Tensor]:
    """Three rows of four new tokens after five, the second row left-padded by six: its first query sees nothing."""
    batch, sequence, past = 3, 4, 5
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    mask[1, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    ids = integers(0, 100, batch, sequence, dtype=torch.int64, seed=seed)
    caches = prefill_inputs(program, ids)[3:]
    return [ids, mask, positions, *(floats(*cache_shape(cache, batch, past), seed=seed + 1) for cache in caches)]


@torch.no_grad()
def node_values(emitted: Emitted, inputs: list[Tensor]) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}
    feeds = iter(inputs)
    for node in emitted.program.graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(feeds)
        elif node.op == "get_attr":
            values[node] = load(emitted.program, str(node.target), emitted.read)
        elif node.op == "call_function":
            values[node] = call(node, values.__getitem__)
    return values


def blocks(program: Program) -> dict[str, list[fx.Node]]:
    by_name: dict[str, list[fx.Node]] = {}
    for node in program.graph.graph.nodes:
        if node.op == "call_function":
            by_name.setdefault(node.meta["block"], []).append(node)
    return by_name


def bound(node: fx.Node, values: dict[fx.Node, Any]) -> Tensor | float:
    """How far an operator may be from its reference on equal inputs; zero where both round alike."""
    maker = node.args[0] if node.target is operator.getitem else node
    args = [values[arg] if isinstance(arg, fx.Node) else arg for arg in maker.args]
    value = values[node]
    if maker.target in (ops.linear, ops.router_logits):
        return matmul_bound(args[0], args[1])
    if maker.target == ops.rms_norm:
        return (args[0].shape[-1] + 12) * UNIT * value.abs()
    if maker.target == ops.swiglu:
        return 14 * UNIT * value.abs() + 1e-37
    if maker.target == ops.rope_table:
        return 8 * UNIT * max(1.0, args[2])
    if maker.target == ops.moe_gate and value.is_floating_point():
        return 24 * UNIT * value.abs()
    if maker.target == ops.moe_finalize_routing:
        return 2 * args[2].shape[-1] * UNIT * args[2].sum(-1, keepdim=True) * args[0].abs().max()
    if maker.target == ops.mla_attention:
        q, kv, k_rope, _, heads, _, scale = args
        width = q.shape[-1] // heads
        largest = scale * width * q.abs().max() * max(kv.abs().max(), k_rope.abs().max())
        return (2 * largest * (width + 2) + kv.shape[1] + 20) * UNIT * kv.abs().max()
    if maker.target == ops.attend_latents:
        return latents_bound(args)
    if maker.target == ops.attend_halves:
        latents, rank = torch.cat(args[1:3], -1).squeeze(1), args[3].shape[1]
        return latents_bound([args[0], latents[..., :rank], latents[..., rank:], *args[3:]])
    if maker.target == ops.attend_heads:
        q, key, heads_value, _, scale = args
        largest = scale * key.shape[-1] * q.abs().max() * key.abs().max()
        return (2 * largest * (key.shape[-1] + 2) + key.shape[2] + 20) * UNIT * heads_value.abs().max()
    if maker.target == ops.moe_experts:
        # A product of products: relative error of k + n sums on each side, at the size of the largest output.
        return 2 * (args[0].shape[-1] + args[3][0].shape[0]) * UNIT * value.abs().max()
    if maker.target == ops.grouped_dequantize:
        return expert_bound(node, values)
    if maker.target == ATEN.mean.dim:
        return 2 * args[0].shape[-1] * UNIT * args[0].abs().max()
    return 8 * UNIT if maker.target in (ATEN.tanh.default, ATEN.sigmoid.default) else 0.0


def latents_bound(args: list[Any]) -> Tensor:
    """On each side a score sums its terms and moves its weight by twice its error; then T values of rank terms each."""
    q, c_kv, k_rope, weight, _, heads, v_head_dim, scale = args
    w_uk, w_uv = weight.float().abs().unflatten(0, (heads, -1)).tensor_split((-v_head_dim,), 1)
    queries, latents = q.abs().unflatten(-1, (heads, -1)).transpose(1, 2), c_kv.abs().unsqueeze(1)
    nope, rank = w_uk.shape[1:]
    keys = torch.cat((latents @ w_uk.transpose(-1, -2), k_rope.abs().unsqueeze(1).expand(-1, heads, -1, -1)), -1)
    largest = scale * (queries @ keys.transpose(-1, -2)).max()
    steps = 2 * (2 * largest * (q.shape[-1] // heads + rank + 6) + c_kv.shape[1] + rank + nope + 10)
    return steps * UNIT * (latents @ w_uv.transpose(-1, -2)).max()


def expert_bound(node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
    """Up to its second quantization an expert is exact but for swiglu, whose last bits may move a tie by one step.

    A step of one hidden feature moves the output by its scale times a weight, at most 127 steps of the largest.
    Two such steps a row are allowed, and 16 units for the scale itself.
    """
    _, x_scale, weight_scale, _ = (values[arg] for arg in node.args)
    step = max(scale.max() for scale in weight_scale)
    return 2 * x_scale * 127 * step + 16 * UNIT * values[node].abs()


def assert_operators_agree(emitted: Emitted, inputs: list[Tensor]) -> set[str]:
    """Feed every operator what the fx graph feeds it; → names of the values that were compared."""
    values = node_values(emitted, inputs)
    named = KEEP_ALL | {node.name: value for node, value in values.items()}
    compared: set[str] = set()
    for nodes in blocks(emitted.program).values():
        session = operator_session(emitted.folder, [node.name for node in nodes])
        results = session(session.feeds(named))
        for node in nodes:
            if node.name in results:
                mine, reference = results[node.name], values[node]
                assert mine.dtype == reference.dtype and mine.shape == reference.shape, node.name
                off = (mine.double() - reference.double()).abs()
                assert (off <= bound(node, values)).all(), f"{node.name}: off by {off.max()}"
                compared.add(node.name)
    return compared


def assert_models_agree(emitted: Emitted, inputs: list[Tensor]) -> None:
    """The largest logit difference. Activation codes may flip by one step, and later layers amplify it: 1%."""
    expected = execute(emitted.program, emitted.read, [inputs])[0]
    ids, mask, positions, *past = inputs
    logits, presents = emitted.runner(ids, mask, positions, past)
    for mine, reference in zip([logits, *presents], expected, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == reference.shape
        assert (mine - reference).norm() <= 0.01 * reference.norm()


def check_everything(emitted: Emitted) -> None:
    onnx.checker.check_model(emitted.folder / "model.onnx", full_check=True)
    compared = assert_operators_agree(emitted, cached_inputs(emitted.program))
    single = {n.name for nodes in blocks(emitted.program).values() for n in nodes if is_tensor(n.meta["val"])}
    inside = {name for name in single - compared if "_mlp_experts_" in name}
    assert single - compared == inside, "all but the inner values of routed experts can be taken out"
    assert_models_agree(emitted, cached_inputs(emitted.program, seed=3))
    assert_models_agree(emitted, prefill_inputs(emitted.program, integers(0, 100, 1, 1, dtype=torch.int64)))
