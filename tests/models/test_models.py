"""Our DeepSeek-V3 against transformers' DeepseekV3ForCausalLM, with the same weights and the same inputs."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from tiny import ABSENT, BIAS, YARN, float32_bound, greedy, inputs, load_model, random_ids, tiny_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, DeepseekV3TopkRouter

from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.checkpoint.config import parse_config
from fxquant.models import DeepseekV3, rotary
from fxquant.models.layers import Gate

TRAINED = [
    folder
    for folder in (ROOT / "examples/tiny_deepseek_v3", ROOT.parent / "shared/models/tiny/bf16")
    if (folder / "config.json").is_file()
]

SMALLEST = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 96, "moe_intermediate_size": 64}
DEFAULTS = ("n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob", "q_lora_rank")
DEFAULTS += ("routed_scaling_factor", "first_k_dense_replace", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
DEFAULTS += ("v_head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "attention_bias", "max_position_embeddings")

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"num_hidden_layers": 3},
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 40 * 32},
    "no q_lora_rank": {"q_lora_rank": None},
    "no dense layers": {"first_k_dense_replace": 0},
    "attention bias": {"attention_bias": True},
    "fp8": {"fp8": True, "num_nextn_predict_layers": 1},
    "keys absent": dict.fromkeys(DEFAULTS, ABSENT) | SMALLEST | {"num_hidden_layers": 4, "n_routed_experts": 16},
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def transformers_model(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """transformers' model with the checkpoint's weights, decoded by us; the correction bias stays float32."""
    config = AutoConfig.from_pretrained(checkpoint.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    model.load_state_dict(fused_state(checkpoint, config.num_hidden_layers, dtype), strict=True, assign=True)
    return model.eval()


def fused_state(checkpoint: Checkpoint, num_layers: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """transformers' names: per layer `experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` [E, H, I]."""
    state, experts = {}, {}
    for name in checkpoint.tensors:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= num_layers:
            continue
        tensor = checkpoint.read(name) if name.endswith(BIAS) else checkpoint.read(name).to(dtype)
        expert = re.match(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
        if expert:
            experts.setdefault(expert[1], {})[expert[3], int(expert[2])] = tensor
        else:
            state[name] = tensor
    for prefix, parts in experts.items():
        count = len(parts) // 3
        state[f"{prefix}.gate_up_proj"] = torch.stack(
            [torch.cat((parts["gate", e], parts["up", e])) for e in range(count)]
        )
        state[f"{prefix}.down_proj"] = torch.stack([parts["down", e] for e in range(count)])
    return state


def bfloat16_bound(model: DeepseekV3, logits: Tensor) -> float:
    """Each implementation rounds the outputs of the two blocks a layer to bfloat16, by at most 2**-8 of their size."""
    return 2 * 2 * model.config.num_hidden_layers * 2.0**-8 * float(logits.abs().max())


@contextmanager
def routing_of(model: DeepseekV3, other: nn.Module) -> Iterator[None]:
    """Let `other` take the experts that `model` took in its forward before: after bfloat16 rounding two experts of
    nearly equal score may change places, which moves logits by more than rounding does."""
    routed: list[Tensor] = []

    def replay(router: nn.Module, _: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, ids = output[0], routed.pop(0)
        weights = logits.sigmoid().gather(-1, ids)
        if router.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights * router.routed_scaling_factor, ids

    gates = [module for module in model.modules() if isinstance(module, Gate)]
    hooks = [gate.register_forward_hook(lambda _m, _i, out: routed.append(out[0].flatten(0, -2))) for gate in gates]
    routers = [module for module in other.modules() if isinstance(module, DeepseekV3TopkRouter)]
    hooks += [router.register_forward_hook(replay) for router in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    assert not routed


PROMPT, STEPS = 16, 64
"""80 tokens: the YaRN configuration extends 32 positions, so the comparison has positions within and beyond."""


def check_float32(checkpoint: Checkpoint) -> None:
    """Same logits, and the same greedy continuation: each token is transformers' first after the ones before it."""
    model, other = load_model(checkpoint), transformers_model(checkpoint, torch.float32)
    ids = random_ids(model, 2, PROMPT)
    continued = torch.cat((ids, greedy(model, ids, STEPS)), 1)
    expected = other(continued).logits
    logits, _ = model(*inputs(model, continued))
    assert (logits - expected).abs().max() <= float32_bound(model, expected)
    assert torch.equal(continued[:, PROMPT:], expected[:, PROMPT - 1 : -1].argmax(-1))


def check_bfloat16(checkpoint: Checkpoint) -> None:
    """Logits within rounding, and greedy tokens that transformers ranks first or within rounding of the first."""
    model, other = load_model(checkpoint, torch.bfloat16), transformers_model(checkpoint, torch.bfloat16)
    ids = random_ids(model, 2, PROMPT)
    continued = torch.cat((ids, greedy(model, ids, STEPS)), 1)
    with routing_of(model, other):
        logits, _ = model(*inputs(model, continued))
        expected = other(continued).logits.float()
    assert logits.dtype is torch.bfloat16
    bound = bfloat16_bound(model, expected)
    assert (logits.float() - expected).abs().max() <= bound
    scores = expected[:, PROMPT - 1 : -1]
    taken = scores.gather(-1, continued[:, PROMPT:, None])[..., 0]
    assert ((scores.max(-1).values - taken) <= 2 * bound).all()


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_float32_is_that_of_transformers(tiny: Callable[..., Checkpoint], options: dict[str, Any]) -> None:
    check_float32(tiny(**options))


@pytest.mark.slow
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_bfloat16_is_that_of_transformers(tiny: Callable[..., Checkpoint], options: dict[str, Any]) -> None:
    check_bfloat16(tiny(**options))


@pytest.mark.slow
@pytest.mark.parametrize("folder", TRAINED, ids=lambda folder: folder.name)
def test_trained_model_is_that_of_transformers(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    check_float32(checkpoint)
    check_bfloat16(checkpoint)


# the cache and padding


@pytest.mark.parametrize("options", [{}, CONFIGS["yarn"]], ids=["plain", "yarn"])
def test_cached_decode_is_full_prefill(tiny: Callable[..., Checkpoint], options: dict[str, Any]) -> None:
    model = load_model(tiny(**options))
    ids = random_ids(model, 2, 40)
    expected, latents = model(*inputs(model, ids))
    past, parts = None, []
    for part in ids.split([20, 1, 1, 15, 3], 1):
        logits, past = model(*inputs(model, part, past))
        parts.append(logits)
    assert (torch.cat(parts, 1) - expected).abs().max() <= float32_bound(model, expected)
    for grown, whole in zip(past, latents, strict=True):
        assert grown.shape == whole.shape == (2, 40, 32 + 8)
        assert (grown - whole).abs().max() <= float32_bound(model, whole)


def test_left_padding_changes_nothing(tiny: Callable[..., Checkpoint]) -> None:
    """Rows of 12, 7 and 1 tokens in one batch, prefill and one more token each, against each row alone."""
    model, lengths, total = load_model(tiny()), [12, 7, 1], 12
    ids = random_ids(model, 3, total + 1)
    mask = torch.tensor([[0] * (total - length) + [1] * (length + 1) for length in lengths])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    first, past = model(ids[:, :-1], mask[:, :-1], positions[:, :-1], model.empty_cache(3))
    last, _ = model(ids[:, -1:], mask, positions[:, -1:], past)
    padded = torch.cat((first, last), 1)
    for row, length in enumerate(lengths):
        alone, _ = model(*inputs(model, ids[row : row + 1, total - length :]))
        assert (padded[row, total - length :] - alone[0]).abs().max() <= float32_bound(model, alone)


def test_future_tokens_are_not_seen(tiny: Callable[..., Checkpoint]) -> None:
    model = load_model(tiny())
    ids = random_ids(model, 1, 12)
    changed = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % model.config.vocab_size), 1)
    before, after = model(*inputs(model, ids))[0], model(*inputs(model, changed))[0]
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


# rotary embedding and routing


@pytest.mark.parametrize("mscales", [(1.0, 1.0), (0.7, 0.5)], ids=str)
def test_published_rotary_frequencies_are_those_of_transformers(mscales: tuple[float, float]) -> None:
    """64 wide, 4096 positions extended 40 times: the ramp between the frequencies starts and ends inside."""
    scaling = YARN | {"original_max_position_embeddings": 4096, "mscale": mscales[0], "mscale_all_dim": mscales[1]}
    given = tiny_config(qk_rope_head_dim=64, rope_scaling=scaling, max_position_embeddings=163840)
    config = parse_config(given, "config.json")
    theirs = DeepseekV3RotaryEmbedding(AutoConfig.for_model(**given))
    ours = torch.tensor(rotary.frequencies(config))
    # the same few float32 steps
    assert ((ours - theirs.inv_freq).abs() <= 4 * 2.0**-24 * ours).all()
    assert rotary.attention_factor(config) == theirs.attention_scaling


@pytest.mark.parametrize("bias", ["none", "spread", "strongly negative"])
def test_gate_is_that_of_transformers(bias: str) -> None:
    """4096 random tokens through both modules; the gate against a loop is in test_ops_moe.py."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4096, 64, generator=generator), torch.randn(256, 64, generator=generator) / 8
    spread = torch.randn(256, generator=generator)
    correction = {"none": torch.zeros(256), "spread": spread / 10, "strongly negative": spread - 30}[bias]
    config = AutoConfig.for_model("deepseek_v3", hidden_size=64)
    router, gate = DeepseekV3TopkRouter(config), Gate(64, 256, 8, 8, 4, True, 2.5)
    for module in (router, gate):
        module.weight.copy_(weight)
        module.e_score_correction_bias.copy_(correction)
    ids, weights = gate(x)
    _, their_weights, their_ids = router(x)
    order, their_order = ids.argsort(-1), their_ids.argsort(-1)
    assert torch.equal(ids.gather(-1, order), their_ids.gather(-1, their_order))
    # the same float32 steps; only the order in which the eight scores are summed differs
    difference = weights.gather(-1, order) - their_weights.gather(-1, their_order)
    assert (difference.abs() <= 8 * 2.0**-24 * weights.max()).all()


def test_model_without_shared_experts(tiny: Callable[..., Checkpoint]) -> None:
    checkpoint = tiny()
    config = {**checkpoint.config, "n_shared_experts": 0}
    alone, both = load_model(Checkpoint(checkpoint.folder, config, checkpoint.tensors)), load_model(checkpoint)
    assert alone.model.layers[1].mlp.shared_experts is None
    both.model.layers[1].mlp.shared_experts.down_proj.weight.zero_()
    ids = random_ids(both, 2, 5)
    assert torch.equal(alone(*inputs(alone, ids))[0], both(*inputs(both, ids))[0])
