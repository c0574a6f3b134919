"""Leaf modules: those that hold the model's parameters, each one dialect operator."""

import torch
from torch import Tensor, nn

from fxquant import ops
from fxquant.policy.kinds import Kind
from fxquant.schemes.roles import tensor_name


class Linear(nn.Module):
    """`fxq::linear` with weight [out_features, in_features] and an optional bias [out_features]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """`fxq::rms_norm` with weight [width]."""

    kind = Kind.NORM

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """`fxq::embedding` with weight [vocab_size, hidden_size]."""

    kind = Kind.EMBEDDING

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(self.weight, ids)


class Gate(nn.Module):
    """Router: chooses experts per token; weight [experts, hidden], e_score_correction_bias float32 [experts]."""

    kind = Kind.GATE

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, n_group: int, topk_group: int, norm_topk_prob: bool,
        routed_scaling_factor: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32))
        self.top_k, self.n_group, self.topk_group = top_k, n_group, topk_group
        self.norm_topk_prob, self.routed_scaling_factor = norm_topk_prob, routed_scaling_factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., hidden] → expert ids int64 [..., top_k], weights float32 [..., top_k]."""
        logits = ops.router_logits(x, self.weight)
        return ops.moe_gate(
            logits, self.e_score_correction_bias, self.top_k, self.n_group, self.topk_group, self.norm_topk_prob,
            self.routed_scaling_factor,
        )  # fmt: skip


class RoutedExperts(nn.Module):
    """All experts of a layer as one node; each stacked parameter is made of one checkpoint tensor per expert."""

    kind = Kind.ROUTED_EXPERT

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return ops.moe_experts(x, ids, weights, self.gate_proj, self.up_proj, self.down_proj)

    def checkpoint_names(self, prefix: str, parameter: str) -> tuple[str, ...]:
        """Names of the checkpoint tensors behind `<prefix>.<parameter>`, expert 0 first."""
        return tuple(tensor_name(module, "weight") for module in self.checkpoint_modules(prefix, parameter))

    def checkpoint_modules(self, prefix: str, parameter: str) -> tuple[str, ...]:
        """The modules of those."""
        return tuple(f"{prefix}.{expert}.{parameter}" for expert in range(self.num_experts))
