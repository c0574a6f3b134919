"""Adapters: one class of a foreign model as one of ours. They are data, for the families here and a file's LEAVES.

An adapter is called with a module and the current `Adaptation`, and returns the module that replaces it while the
model is traced. Fields give the dotted path of the attribute that holds a part; the defaults are the names in Hugging
Face checkpoints. A size of None is taken from config.json.

    LEAVES = {LoopMoE: adapters.MoE(gate_weight="router.weight", experts="pool", gate_proj="w1", up_proj="w3")}

Any function `(module, adaptation) -> nn.Module` is an adapter too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxquant import models
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.frontend.assemble import assemble, fetch, optional_parameter, parameter
from fxquant.models import layers
from fxquant.policy.kinds import Kind


class Adaptation(Protocol):
    """The part of `fxquant.frontend.adapt.Adaptation` that an adapter may use."""

    config: DeepseekV3Config

    def convert(self, module: nn.Module) -> nn.Module:
        """The replacement of `module`."""

    def mark(self, module: nn.Module, kind: Kind) -> nn.Module:
        """Set the kind of `module` and return it."""

    def gate(self, moe: nn.Module) -> nn.Module | None:
        """The gate of `moe` that runs its own forward, (ids, weights) of x; None: an adapter makes it."""

    def check_experts(self, moe: nn.Module, experts: Any) -> None:
        """Raise FxquantError for an expert that computes something else than `down(silu(gate x) * up x)`."""


Adapter = Callable[[nn.Module, Adaptation], nn.Module]
Size = str | int | float | bool | None
"""A number, the path of the attribute that holds it, or None to take it from config.json."""


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias`."""

    weight: str = "weight"
    bias: str = "bias"

    def __call__(self, module: nn.Module, adaptation: Adaptation) -> nn.Module:
        bias = getattr(module, self.bias, None)
        return assemble(layers.Linear, weight=parameter(fetch(module, self.weight)), bias=optional_parameter(bias))


@dataclass(frozen=True)
class Embedding:
    """`weight[ids]`."""

    weight: str = "weight"

    def __call__(self, module: nn.Module, adaptation: Adaptation) -> nn.Module:
        return assemble(layers.Embedding, weight=parameter(fetch(module, self.weight)))


@dataclass(frozen=True)
class RMSNorm:
    """`x / sqrt(mean(x²) + eps) * weight`, in float32."""

    weight: str = "weight"
    eps: str | float = "eps"

    def __call__(self, module: nn.Module, adaptation: Adaptation) -> nn.Module:
        eps = fetch(module, self.eps) if isinstance(self.eps, str) else self.eps
        return assemble(layers.RMSNorm, weight=parameter(fetch(module, self.weight)), eps=float(eps))


@dataclass(frozen=True)
class MLP:
    """`down(silu(gate x) * up x)`; inside an MoE it is the shared expert."""

    gate_proj: str = "gate_proj"
    up_proj: str = "up_proj"
    down_proj: str = "down_proj"

    def __call__(self, module: nn.Module, adaptation: Adaptation) -> nn.Module:
        names = {"gate_proj": self.gate_proj, "up_proj": self.up_proj, "down_proj": self.down_proj}
        parts = {ours: adaptation.convert(fetch(module, theirs)) for ours, theirs in names.items()}
        return assemble(models.MLP, kind=Kind.DENSE_MLP, **parts)


@dataclass(frozen=True)
class MoE:
    """Routed experts plus shared experts.

    experts      a list of modules with weights `gate_proj`, `up_proj` [I, H] and `down_proj` [H, I], or one module with
                 `gate_up_proj` [E, 2I, H], gate rows first, and `down_proj` [E, H, I]
    """

    gate_weight: str = "gate.weight"
    correction_bias: str = "gate.e_score_correction_bias"
    experts: str = "experts"
    gate_proj: str = "gate_proj.weight"
    up_proj: str = "up_proj.weight"
    down_proj: str = "down_proj.weight"
    gate_up_proj: str | None = None
    shared_experts: str | None = "shared_experts"
    top_k: Size = None
    n_group: Size = None
    topk_group: Size = None
    norm_topk_prob: Size = None
    routed_scaling_factor: Size = None

    def __call__(self, module: nn.Module, adaptation: Adaptation) -> nn.Module:
        held = fetch(module, self.experts)
        adaptation.check_experts(module, held)
        experts = self.routed(held)
        shared = fetch(module, self.shared_experts) if self.shared_experts else None
        if shared is not None:
            shared = adaptation.mark(adaptation.convert(shared), Kind.SHARED_EXPERT)
        gate = adaptation.gate(module) or self._gate(module, adaptation)
        return assemble(models.MoE, gate=gate, experts=experts, shared_experts=shared)

    def routed(self, experts: Any) -> nn.Module:
        """A list of experts, or the module that holds their stacked weights, as one module."""
        gate_proj, up_proj, down_proj = self._stacks(experts)
        return assemble(
            layers.RoutedExperts, num_experts=len(gate_proj), gate_proj=parameter(gate_proj),
            up_proj=parameter(up_proj), down_proj=parameter(down_proj),
        )  # fmt: skip

    def _stacks(self, experts: Any) -> tuple[Tensor, Tensor, Tensor]:
        """gate_proj, up_proj [E, I, H] and down_proj [E, H, I]; on meta, stacking takes no memory."""
        if self.gate_up_proj is not None:
            gate_proj, up_proj = fetch(experts, self.gate_up_proj).detach().chunk(2, 1)
            return gate_proj, up_proj, fetch(experts, self.down_proj)
        gate, up, down = (
            torch.stack([fetch(expert, name).detach() for expert in experts])
            for name in (self.gate_proj, self.up_proj, self.down_proj)
        )
        return gate, up, down

    def _gate(self, module: nn.Module, adaptation: Adaptation) -> nn.Module:
        bias, config = fetch(module, self.correction_bias), adaptation.config
        if bias is None:
            fact = f"its gate has no {self.correction_bias}, which DeepSeek-V3 adds to the scores to choose experts."
            raise FxquantError(type(module).__name__, fact, "Create it for every model size; zeros change nothing.")
        sizes = {
            "top_k": (self.top_k, config.num_experts_per_tok),
            "n_group": (self.n_group, config.n_group),
            "topk_group": (self.topk_group, config.topk_group),
            "norm_topk_prob": (self.norm_topk_prob, config.norm_topk_prob),
            "routed_scaling_factor": (self.routed_scaling_factor, config.routed_scaling_factor),
        }
        values = {name: _size(module, *given) for name, given in sizes.items()}
        weight = parameter(fetch(module, self.gate_weight))
        return assemble(layers.Gate, weight=weight, e_score_correction_bias=parameter(bias), **values)


@dataclass(frozen=True)
class Experts:
    """The experts of `moe` as one module that holds their stacked weights."""

    moe: MoE

    def __call__(self, module: nn.Module, adaptation: Adaptation) -> nn.Module:
        return self.moe.routed(module)


@dataclass(frozen=True)
class Attention:
    """Multi-head latent attention, however the module computes it."""

    q_proj: str = "q_proj"
    q_a_proj: str = "q_a_proj"
    q_a_layernorm: str = "q_a_layernorm"
    q_b_proj: str = "q_b_proj"
    kv_a_proj_with_mqa: str = "kv_a_proj_with_mqa"
    kv_a_layernorm: str = "kv_a_layernorm"
    kv_b_proj: str = "kv_b_proj"
    o_proj: str = "o_proj"
    num_attention_heads: Size = None
    kv_lora_rank: Size = None
    qk_nope_head_dim: Size = None
    qk_rope_head_dim: Size = None
    v_head_dim: Size = None
    softmax_scale: Size = None

    def __call__(self, module: nn.Module, adaptation: Adaptation) -> nn.Module:
        low_rank = getattr(module, self.q_a_proj, None) is not None
        queries = ("q_a_proj", "q_a_layernorm", "q_b_proj") if low_rank else ("q_proj",)
        names = (*queries, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
        parts = {name: adaptation.convert(fetch(module, getattr(self, name))) for name in names}
        config = adaptation.config
        sizes = ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        own: dict[str, Any] = {name: _size(module, getattr(self, name), getattr(config, name)) for name in sizes}
        own["q_lora_rank"] = len(fetch(parts["q_a_proj"], "weight")) if low_rank else None
        scale = _size(module, self.softmax_scale, config.softmax_scale)
        return assemble(models.MLA, config=config.model_copy(update=own), softmax_scale=float(scale), **parts)


def _size(module: nn.Module, given: Size, default: Any) -> Any:
    if given is None:
        return default
    return fetch(module, given) if isinstance(given, str) else given
