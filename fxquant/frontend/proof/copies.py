"""Copies of a model that run in a second: their configs, tokens and weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.frontend.proof.numbers import numbers_of
from fxquant.frontend.recognition.edited import own_code
from fxquant.frontend.recognition.published import is_published
from fxquant.models.layers import Gate, RoutedExperts
from fxquant.schemes.roles import tensor_name

LONGEST = 2048
"""Numbers in a file up to this are taken for lengths: the tokens of a copy go past them."""


@dataclass(frozen=True)
class Tokens:
    """ids int64 [rows, lengths[0] + steps], each row's prompt before `lengths[0]`, of `lengths[row]` tokens; `steps`
    follow one at a time."""

    ids: Tensor
    lengths: tuple[int, ...]
    steps: int


def wide_config(config: DeepseekV3Config) -> DeepseekV3Config:
    """Two layers: hidden_size, heads, experts, groups, the presence of a low rank and rotary scaling stay. The more
    heads or experts there are, the narrower they are."""
    heads, experts = config.num_attention_heads, config.n_routed_experts
    return _narrow(config).model_copy(
        update={
            "num_hidden_layers": 2, "first_k_dense_replace": min(config.first_k_dense_replace, 1),
            "num_attention_heads": heads, "v_head_dim": max(4, min(12, 128 // heads)),
            "n_routed_experts": experts, "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": max(4, min(32, 512 // max(experts, 1) // 4 * 4)),  # grouped products take 16 bytes
        }
    )  # fmt: skip


def deep_config(config: DeepseekV3Config) -> DeepseekV3Config:
    """All layers, narrow, for fewer positions: caches of all layers are as long as the context."""
    original = config.rope_scaling.original_max_position_embeddings if config.rope_scaling else 0
    positions = min(config.max_position_embeddings, 2 * max(original, LONGEST))
    return _narrow(config).model_copy(update={"hidden_size": 64, "max_position_embeddings": positions})


def _narrow(config: DeepseekV3Config) -> DeepseekV3Config:
    groups, selected = config.n_group, config.topk_group
    # two experts per group: a group's score is the sum of its two best
    experts = groups * max(2, -(-8 // groups)) if groups <= 8 else 2 * groups
    return config.model_copy(
        update={
            "vocab_size": 64, "num_attention_heads": 2, "intermediate_size": 48, "moe_intermediate_size": 32,
            "n_routed_experts": experts,
            "num_experts_per_tok": min(config.num_experts_per_tok, selected * experts // groups, 4),
            "q_lora_rank": None if config.q_lora_rank is None else 24, "kv_lora_rank": 16,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "num_nextn_predict_layers": 0,
        }
    )  # fmt: skip


def tokens(vocab_size: int, lengths: tuple[int, ...], steps: int) -> Tokens:
    """Random ids."""
    ids = torch.randint(vocab_size, (len(lengths), lengths[0] + steps), generator=generator())
    return Tokens(ids, lengths, steps)


def every_expert(config: DeepseekV3Config) -> int:
    """Tokens of a prompt of which each expert is given some four."""
    return 4 * config.n_routed_experts // max(config.num_experts_per_tok, 1) + 16


def numbers(model: nn.Module) -> set[int]:
    """Whole numbers that may be lengths: in the classes of `model` that are neither published, torch's nor ours, and in
    what their modules hold."""
    own = [module for module in model.modules() if own_code(module) and not is_published(module)]
    found = {value for cls in {type(module) for module in own} for value in numbers_of(cls)}
    for module in own:
        found |= {value for value in vars(module).values() if type(value) is int}
    return {number for number in found if 0 < number <= LONGEST}


def fill(model: nn.Module, tail: float) -> None:
    """Random parameters: of deviation `1 / √in_features`, each element times a log-normal factor of deviation `tail`;
    norms around one. With a tail, activations reach into the tens."""
    source = generator()
    for tensor in model.parameters():
        values = torch.randn(tensor.shape, generator=source)
        if tail:
            values *= (tail * torch.randn(tensor.shape, generator=source)).exp()
        tensor.copy_(1 + values / (2 if tail else 10) if tensor.dim() < 2 else values / tensor.shape[-1] ** 0.5)


def named_tensors(root: nn.Module, nonnegative_bias: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint name → value for an adapted model; correction biases, often buffers, are made random."""
    source = generator()
    for path, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, Gate):
            bias = module.e_score_correction_bias  # shares memory with the gate that the model's own forward reads
            values = torch.randn(bias.shape, generator=source) / 10
            bias.copy_(values.abs() if nonnegative_bias else values)
        for name, tensor in module._parameters.items():
            if isinstance(module, RoutedExperts) and tensor is not None:
                yield from zip(module.checkpoint_names(path, name), tensor, strict=True)
            elif tensor is not None:
                yield tensor_name(path, name), tensor


def generator() -> torch.Generator:
    """Always the same numbers."""
    return torch.Generator().manual_seed(0)
