"""DeepSeek-V3 (arXiv:2412.19437) with the parameter names of its Hugging Face checkpoints.

Blocks are plain modules: subclass one and pass it to `DeepseekV3(config, layer=MyLayer)`; every output of the compiler
then computes what its forward does. B batch, S new positions, T = past + S positions.
"""

import torch
from torch import Tensor, nn

from fxquant import ops
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.models import rotary
from fxquant.models.layers import Embedding, Gate, Linear, RMSNorm, RoutedExperts
from fxquant.policy.kinds import Kind

LATENT_NORM_EPS = 1e-6
"""The norms of the latents take DeepSeek's default, not `rms_norm_eps`."""


class MLP(nn.Module):
    """`down(silu(gate x) * up x)`; a dense MLP or a shared expert, as `kind` says."""

    def __init__(self, config: DeepseekV3Config, intermediate_size: int, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.gate_proj = Linear(config.hidden_size, intermediate_size)
        self.up_proj = Linear(config.hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class MoE(nn.Module):
    """Routed experts plus shared experts."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.gate = Gate(
            config.hidden_size, config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group,
            config.norm_topk_prob, config.routed_scaling_factor,
        )  # fmt: skip
        self.experts = RoutedExperts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)
        width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config, width, Kind.SHARED_EXPERT) if width else None

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.gate(x)
        routed = self.experts(x, ids, weights)
        return routed + self.shared_experts(x) if self.shared_experts is not None else routed


class MLA(nn.Module):
    """Multi-head latent attention (MLA); its cache is one latent tensor [B, past, kv_lora_rank + qk_rope_head_dim]."""

    kind = Kind.ATTENTION

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config, self.softmax_scale = config, config.softmax_scale
        heads = config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, latent, bias=config.attention_bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size, bias=config.attention_bias)

    def queries(self, x: Tensor) -> Tensor:
        """x [B, S, hidden] → [B, S, heads · qk_head_dim], not yet rotated."""
        if self.config.q_lora_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor]:
        """→ output [B, S, hidden] and the latent cache with the new positions appended [B, T, latent]."""
        config = self.config
        widths = [config.kv_lora_rank, config.qk_rope_head_dim]
        q = ops.rope(self.queries(x), cos, sin, config.num_attention_heads)
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split(widths, -1)
        new = torch.cat((self.kv_a_layernorm(c_kv), ops.rope(k_rope, cos, sin, 1)), -1)
        present = torch.cat((past, new), 1)
        c_kv, k_rope = present.split(widths, -1)
        context = ops.mla_attention(
            q, self.kv_b_proj(c_kv), k_rope, attention_mask, config.num_attention_heads, config.v_head_dim,
            self.softmax_scale,
        )  # fmt: skip
        return self.o_proj(context), present


class DecoderLayer(nn.Module):
    """Attention and MLP with pre-norms and residuals."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = index < config.first_k_dense_replace
        self.mlp = MLP(config, config.intermediate_size, Kind.DENSE_MLP) if dense else MoE(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor]:
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, attention_mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: DeepseekV3Config, layer: type[DecoderLayer]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.inv_freq, self.attention_factor = rotary.frequencies(config), rotary.attention_factor(config)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        cos, sin = ops.rope_table(position_ids, self.inv_freq, self.attention_factor)
        x, presents = self.embed_tokens(input_ids), []
        for layer, cache in zip(self.layers, past, strict=True):
            x, present = layer(x, cos, sin, attention_mask, cache)
            presents.append(present)
        return self.norm(x), presents


class Head(Linear):
    """Logits over the vocabulary."""

    kind = Kind.HEAD


class DeepseekV3(nn.Module):
    """The causal language model; one forward serves prefill (past of length 0) and cached decode."""

    def __init__(self, config: DeepseekV3Config, layer: type[DecoderLayer] = DecoderLayer) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, layer)
        self.lm_head = Head(config.hidden_size, config.vocab_size)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """input_ids, position_ids int64 [B, S]; attention_mask int64 [B, T], 0 on (left) padding; past: one latent
        [B, T - S, kv_lora_rank + qk_rope_head_dim] per layer → logits [B, S, vocabulary] and the grown latents."""
        x, presents = self.model(input_ids, attention_mask, position_ids, past)
        return self.lm_head(x), presents

    def mtp_modules(self) -> tuple[str, ...]:
        """`mtp_paths` of its config."""
        return mtp_paths(self.config)

    def empty_cache(self, batch: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """`past` for the first call."""
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return [torch.empty(batch, 0, width, dtype=dtype) for _ in self.model.layers]


def mtp_paths(config: DeepseekV3Config) -> tuple[str, ...]:
    """Checkpoint paths of the multi-token prediction layers, which follow the decoder layers and are not traced."""
    first, count = config.num_hidden_layers, config.num_nextn_predict_layers
    return tuple(f"model.layers.{index}" for index in range(first, first + count))
