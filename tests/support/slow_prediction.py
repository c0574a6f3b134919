"""A prediction layer on whole documents in float64, from the published formulas: no operator of fxquant is used.

DeepSeek-V3, arXiv:2412.19437: section 2.1 for attention, experts and their gate, 2.2 for the prediction layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fxquant.checkpoint.config import DeepseekV3Config

Array = NDArray[np.float64]
LATENT_EPS = 1e-6


@dataclass
class SlowLayer:
    """The layer at `path`; `read` gives the float64 weight of a name below it.

    inputs  name of a linear → what it multiplied, [S, k], after `run`
    """

    config: DeepseekV3Config
    read: Callable[[str], Array]
    inputs: dict[str, Array] = field(default_factory=dict)

    def run(self, hidden: Array, tokens: NDArray[np.int64]) -> Array:
        """hidden [S, h] and the token that each position reads → the layer's hidden states [S, h]."""
        eps, read = self.config.rms_norm_eps, self.read
        embedded = normed(read("embed_tokens.weight")[tokens], read("enorm.weight"), eps)
        before = normed(hidden, read("hnorm.weight"), eps)
        x = np.concatenate([embedded, before], 1) @ read("eh_proj.weight").T
        x = x + self._attention(normed(x, read("input_layernorm.weight"), eps))
        return x + self._experts(normed(x, read("post_attention_layernorm.weight"), eps))

    def _linear(self, name: str, x: Array) -> Array:
        self.inputs[name] = x
        return x @ self.read(f"{name}.weight").T

    def _attention(self, x: Array) -> Array:
        config, heads, nope = self.config, self.config.num_attention_heads, self.config.qk_nope_head_dim
        latent = normed(self._linear("self_attn.q_a_proj", x), self.read("self_attn.q_a_layernorm.weight"), LATENT_EPS)
        queries = self._linear("self_attn.q_b_proj", latent).reshape(len(x), heads, -1)
        down = self._linear("self_attn.kv_a_proj_with_mqa", x)
        compressed, shared_key = down[:, : config.kv_lora_rank], self._turned(down[:, config.kv_lora_rank :])
        compressed = normed(compressed, self.read("self_attn.kv_a_layernorm.weight"), LATENT_EPS)
        up = (compressed @ self.read("self_attn.kv_b_proj.weight").T).reshape(len(x), heads, -1)
        context = np.zeros((len(x), heads, config.v_head_dim))
        for head in range(heads):
            turned = self._turned(queries[:, head, nope:])
            for place in range(len(x)):
                scores = up[: place + 1, head, :nope] @ queries[place, head, :nope]
                scores = (scores + shared_key[: place + 1] @ turned[place]) / np.sqrt(config.qk_head_dim)
                likely = np.exp(scores - scores.max())
                context[place, head] = likely / likely.sum() @ up[: place + 1, head, nope:]
        return self._linear("self_attn.o_proj", context.reshape(len(x), -1))

    def _turned(self, x: Array) -> Array:
        """Each pair of neighbours turned by its position: plain rotary embedding, without YaRN."""
        width = x.shape[1]
        angles = np.outer(np.arange(len(x)), self.config.rope_theta ** (-np.arange(0, width, 2) / width))
        turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], 2).reshape(x.shape)

    def _experts(self, x: Array) -> Array:
        result = self._expert("mlp.shared_experts", x)
        for place, row in enumerate(x):
            for expert, weight in self._chosen(row):
                result[place] += weight * self._expert(f"mlp.experts.{expert}", row[None])[0]
        return result

    def _expert(self, name: str, x: Array) -> Array:
        gate, up = self._linear(f"{name}.gate_proj", x), self._linear(f"{name}.up_proj", x)
        return self._linear(f"{name}.down_proj", gate / (1 + np.exp(-gate)) * up)

    def _chosen(self, row: Array) -> list[tuple[int, float]]:
        config = self.config
        affinity = 1 / (1 + np.exp(-(self.read("mlp.gate.weight") @ row)))
        biased = (affinity + self.read("mlp.gate.e_score_correction_bias")).reshape(config.n_group, -1)
        best = np.argsort(-np.sort(biased, 1)[:, -2:].sum(1))[: config.topk_group]
        allowed = np.full(biased.shape, -np.inf)
        allowed[best] = biased[best]
        chosen = np.argsort(-allowed.ravel())[: config.num_experts_per_tok]
        total = affinity[chosen].sum() if config.norm_topk_prob else 1.0
        return [(int(expert), affinity[expert] / total * config.routed_scaling_factor) for expert in chosen]


def normed(x: Array, weight: Array, eps: float) -> Array:
    """`x / sqrt(mean(x²) + eps) * weight` of each row."""
    return x / np.sqrt((x**2).mean(1, keepdims=True) + eps) * weight
