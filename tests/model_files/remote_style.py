"""A model in the class structure and names of the modeling_deepseek.py that checkpoint folders have: rotary embedding
inside attention, expanded keys in the cache, experts as modules that are given sorted tokens. Without transformers."""

import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional


class DeepseekV3Config:
    def __init__(self, **values):
        self.__dict__.update(values)

    def to_dict(self):
        return dict(self.__dict__)


class DeepseekV3RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class DeepseekV3YarnRotaryEmbedding(nn.Module):
    def __init__(self, width, base, yarn):
        super().__init__()
        self.width, self.base, self.yarn = width, base, yarn

    def forward(self, x, seq_len):
        inverse = 1.0 / self.base ** (torch.arange(0, self.width, 2, dtype=torch.float32) / self.width)
        if self.yarn:
            ends = [
                self.width
                * math.log(self.yarn["original_max_position_embeddings"] / (turns * 2 * math.pi))
                / (2 * math.log(self.base))
                for turns in (self.yarn["beta_fast"], self.yarn["beta_slow"])
            ]
            low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), self.width - 1)
            ramp = ((torch.arange(self.width // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
            inverse = inverse / self.yarn["factor"] * ramp + inverse * (1 - ramp)
        angles = torch.outer(torch.arange(seq_len), inverse).repeat(1, 2)
        return angles.cos(), angles.sin()


def turned(x, cos, sin, position_ids):
    """Pairs to halves, then the rotation of halves."""
    cos, sin = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
    x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class DeepseekV3Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.num_heads = layer_idx, config.num_attention_heads
        self.qk_nope_head_dim, self.qk_rope_head_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.q_head_dim, self.v_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        self.q_lora_rank, self.kv_lora_rank = config.q_lora_rank, config.kv_lora_rank
        size, eps = config.hidden_size, config.rms_norm_eps
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(size, self.num_heads * self.q_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(size, self.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = DeepseekV3RMSNorm(self.q_lora_rank, eps)
            self.q_b_proj = nn.Linear(self.q_lora_rank, self.num_heads * self.q_head_dim, bias=False)
        latent = self.kv_lora_rank + self.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(size, latent, bias=config.attention_bias)
        self.kv_a_layernorm = DeepseekV3RMSNorm(self.kv_lora_rank, eps)
        width = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, width, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, size, bias=config.attention_bias)
        yarn = config.rope_scaling
        self.rotary_emb = DeepseekV3YarnRotaryEmbedding(self.qk_rope_head_dim, config.rope_theta, yarn)
        self.softmax_scale = self.q_head_dim**-0.5
        if yarn and yarn.get("mscale_all_dim") and yarn["factor"] > 1:
            self.softmax_scale *= (0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1) ** 2

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None):
        rows, length, _ = hidden_states.shape
        q = self.q_proj(hidden_states) if self.q_lora_rank is None else self.low_rank(hidden_states)
        q = q.view(rows, length, self.num_heads, self.q_head_dim).transpose(1, 2)
        latent, k_pe = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(rows, length, self.num_heads, -1).transpose(1, 2)
        k_nope, values = kv.split([self.qk_nope_head_dim, self.v_head_dim], -1)
        total = length + past_key_value.get_usable_length(length, self.layer_idx)
        cos, sin = self.rotary_emb(values, seq_len=total)
        q_nope, q_pe = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        k_pe = turned(k_pe.unsqueeze(1), cos, sin, position_ids).expand(-1, self.num_heads, -1, -1)
        q, k = torch.cat((q_nope, turned(q_pe, cos, sin, position_ids)), -1), torch.cat((k_nope, k_pe), -1)
        k, values = past_key_value.update(k, values, self.layer_idx)
        scores = (q @ k.transpose(2, 3)) * self.softmax_scale + attention_mask
        out = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        return self.o_proj(out), None, past_key_value

    def low_rank(self, x):
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))


class DeepseekV3MLP(nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, width, bias=False), nn.Linear(size, width, bias=False)
        self.down_proj, self.act_fn = nn.Linear(width, size, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MoEGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k, self.n_group, self.topk_group = config.num_experts_per_tok, config.n_group, config.topk_group
        self.norm_topk_prob, self.routed_scaling_factor = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts))

    def forward(self, hidden_states):
        rows, length, size = hidden_states.shape
        scores = functional.linear(hidden_states.view(-1, size).float(), self.weight.float()).sigmoid()
        chosen = scores + self.e_score_correction_bias
        groups = chosen.view(rows * length, self.n_group, -1)
        kept = groups.topk(2, -1)[0].sum(-1).topk(self.topk_group, -1)[1]
        left_out = torch.ones(rows * length, self.n_group, dtype=torch.bool).scatter(1, kept, False)
        ids = groups.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(1).topk(self.top_k, -1)[1]
        weights = scores.gather(1, ids)
        if self.top_k > 1 and self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * self.routed_scaling_factor


class DeepseekV3MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, width = config.hidden_size, config.moe_intermediate_size
        self.ep_size = 1
        self.experts = nn.ModuleList(DeepseekV3MLP(size, width) for _ in range(config.n_routed_experts))
        self.gate = MoEGate(config)
        self.shared_experts = DeepseekV3MLP(size, width * config.n_shared_experts)

    def forward(self, hidden_states):
        ids, weights = self.gate(hidden_states)
        x = hidden_states.view(-1, hidden_states.shape[-1])
        order = ids.view(-1).argsort()
        sorted_tokens, start, outputs = x[order // ids.shape[1]], 0, []
        for index, count in enumerate(ids.view(-1).bincount(minlength=len(self.experts)).tolist()):
            if count:
                outputs.append(self.experts[index](sorted_tokens[start : start + count]))
            start += count
        sums = torch.empty_like(torch.cat(outputs))
        sums[order] = torch.cat(outputs)
        routed = (sums.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)
        return routed.view_as(hidden_states) + self.shared_experts(hidden_states)


class DeepseekV3DecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        size = config.hidden_size
        self.self_attn = DeepseekV3Attention(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = DeepseekV3MLP(size, config.intermediate_size) if dense else DeepseekV3MoE(config)
        self.input_layernorm = DeepseekV3RMSNorm(size, config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(size, config.rms_norm_eps)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _, present = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
        )
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), present


class DeepseekV3Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DeepseekV3DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._use_flash_attention_2 = False

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        past = past_key_values.get_usable_length(input_ids.shape[1]) if use_cache else 0
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + length)[None]
        if not self._use_flash_attention_2:
            later = torch.arange(past + length) > torch.arange(past, past + length)[:, None]
            attention_mask = torch.zeros(length, past + length).masked_fill(later, -torch.inf)[None, None]
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, position_ids, past_key_values)[0]
        return self.norm(hidden_states), past_key_values


class DeepseekV3ForCausalLM(nn.Module):
    config_class = DeepseekV3Config

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = DeepseekV3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        hidden_states, past = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        return SimpleNamespace(logits=self.lm_head(hidden_states).float(), past_key_values=past)
