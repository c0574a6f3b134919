"""fxquant's model with a researcher's own MoE in its layers: other names, one matrix a projection, a loop over the
experts that some token chose. One line of LEAVES says what is what."""

import torch
from torch import nn

from fxquant import adapters
from fxquant.models import MLP, DecoderLayer, DeepseekV3, MoE


class PoolMoE(nn.Module):
    def __init__(self, config, common):
        super().__init__()
        self.config, self.common = config, common
        self.router = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.balance = nn.Parameter(torch.zeros(config.n_routed_experts))
        self.pool = nn.ModuleList(
            MLP(config, config.moe_intermediate_size, "routed_expert") for _ in range(config.n_routed_experts)
        )

    def choose(self, scores):
        config = self.config
        groups = (scores + self.balance).unflatten(-1, (config.n_group, -1))
        best = groups.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices
        keep = torch.zeros(groups.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
        return groups.masked_fill(~keep[..., None], -torch.inf).flatten(-2).topk(config.num_experts_per_tok, -1).indices

    def forward(self, x):
        tokens = x.flatten(0, -2)
        scores = self.router(tokens).sigmoid()
        ids = self.choose(scores)
        weights = scores.gather(-1, ids)
        weights = weights / weights.sum(-1, keepdim=True) * self.config.routed_scaling_factor
        y = torch.zeros_like(tokens)
        for expert in ids.unique().tolist():
            row, place = torch.where(ids == expert)
            y[row] += self.pool[expert](tokens[row]) * weights[row, place, None]
        return y.view_as(x) + self.common(x)


class Layer(DecoderLayer):
    def __init__(self, config, index):
        super().__init__(config, index)
        if isinstance(self.mlp, MoE):
            self.mlp = PoolMoE(config, self.mlp.shared_experts)


LEAVES = {
    PoolMoE: adapters.MoE(
        gate_weight="router.weight", correction_bias="balance", experts="pool", shared_experts="common"
    )
}


def build_model(config):
    return DeepseekV3(config, layer=Layer)
