"""A model in the class structure and names of DeepSeek's inference code: caches in buffers, two forms of attention,
experts looped over by counts, linears that may hold FP8. Kernels that need an accelerator are imported and not used."""

import math
from dataclasses import dataclass

import torch
from kernel import act_quant, fp8_gemm, weight_dequant
from torch import nn
from torch.nn import functional

attn_impl = "absorb"
world_size = 1


@dataclass
class ModelArgs:
    max_batch_size: int = 2
    max_seq_len: int = 16384
    dtype: str = "bf16"
    vocab_size: int = 102400
    dim: int = 2048
    inter_dim: int = 10944
    moe_inter_dim: int = 1408
    n_layers: int = 27
    n_dense_layers: int = 1
    n_heads: int = 16
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    n_activated_experts: int = 6
    n_expert_groups: int = 1
    n_limited_groups: int = 1
    score_func: str = "softmax"
    route_scale: float = 1.0
    q_lora_rank: int = 0
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    original_seq_len: int = 4096
    rope_theta: float = 10000.0
    rope_factor: float = 40
    beta_fast: int = 32
    beta_slow: int = 1
    mscale: float = 1.0


def linear(x, weight, bias=None):
    if weight.element_size() > 1:
        return functional.linear(x, weight, bias)
    if bias is not None:
        return functional.linear(x, weight_dequant(weight, weight.scale), bias)
    return fp8_gemm(*act_quant(x), weight, weight.scale)


class ParallelEmbedding(nn.Module):
    def __init__(self, vocab_size, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size // world_size, dim))

    def forward(self, x):
        return functional.embedding(x, self.weight)


class Linear(nn.Module):
    dtype = torch.bfloat16

    def __init__(self, in_features, out_features, bias=False, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype or Linear.dtype))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class ColumnParallelLinear(Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class RowParallelLinear(Linear):
    def forward(self, x):
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def frequencies(args):
    """Complex rotations [max_seq_len, rope / 2]."""
    width, base = args.qk_rope_head_dim, args.rope_theta
    inverse = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if args.max_seq_len > args.original_seq_len:
        ends = [
            width * math.log(args.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (args.beta_fast, args.beta_slow)
        ]
        low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), width - 1)
        ramp = ((torch.arange(width // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        inverse = inverse / args.rope_factor * ramp + inverse * (1 - ramp)
    angles = torch.outer(torch.arange(args.max_seq_len), inverse)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, freqs_cis):
    """Pairs (x0, x1), (x2, x3), … of [B, S, heads, rope] as complex numbers, times their rotation."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs_cis[None, :, None]).flatten(-2).to(x.dtype)


class MLA(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_heads, self.q_lora_rank, self.kv_lora_rank = args.n_heads, args.q_lora_rank, args.kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = args.qk_nope_head_dim, args.qk_rope_head_dim
        self.v_head_dim, self.qk_head_dim = args.v_head_dim, args.qk_nope_head_dim + args.qk_rope_head_dim
        if self.q_lora_rank == 0:
            self.wq = ColumnParallelLinear(args.dim, self.n_heads * self.qk_head_dim)
        else:
            self.wq_a = Linear(args.dim, self.q_lora_rank)
            self.q_norm = RMSNorm(self.q_lora_rank)
            self.wq_b = ColumnParallelLinear(self.q_lora_rank, self.n_heads * self.qk_head_dim)
        self.wkv_a = Linear(args.dim, self.kv_lora_rank + self.qk_rope_head_dim)
        self.kv_norm = RMSNorm(self.kv_lora_rank)
        self.wkv_b = ColumnParallelLinear(self.kv_lora_rank, self.n_heads * (self.qk_nope_head_dim + self.v_head_dim))
        self.wo = RowParallelLinear(self.n_heads * self.v_head_dim, args.dim)
        self.softmax_scale = self.qk_head_dim**-0.5
        if args.max_seq_len > args.original_seq_len:
            self.softmax_scale *= (0.1 * args.mscale * math.log(args.rope_factor) + 1.0) ** 2
        rows, length = args.max_batch_size, args.max_seq_len
        self.register_buffer("kv_cache", torch.zeros(rows, length, self.kv_lora_rank), persistent=False)
        self.register_buffer("pe_cache", torch.zeros(rows, length, self.qk_rope_head_dim), persistent=False)

    def forward(self, x, start_pos, freqs_cis, mask):
        rows, length, _ = x.size()
        end = start_pos + length
        q = self.wq(x) if self.q_lora_rank == 0 else self.wq_b(self.q_norm(self.wq_a(x)))
        q_nope, q_pe = q.view(rows, length, self.n_heads, -1).split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        latent, k_pe = self.wkv_a(x).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        q_pe, k_pe = rotate(q_pe, freqs_cis), rotate(k_pe.unsqueeze(2), freqs_cis).squeeze(2)
        self.kv_cache[:rows, start_pos:end] = self.kv_norm(latent)
        self.pe_cache[:rows, start_pos:end] = k_pe
        latent, k_pe = self.kv_cache[:rows, :end], self.pe_cache[:rows, :end]
        scores = torch.einsum("bshr,btr->bsht", q_pe, k_pe)
        if attn_impl == "naive":
            k_nope, v = self.wkv_b(latent).unflatten(-1, (self.n_heads, -1)).split(
                [self.qk_nope_head_dim, self.v_head_dim], -1
            )  # fmt: skip
            scores = (scores + torch.einsum("bshd,bthd->bsht", q_nope, k_nope)) * self.softmax_scale
        else:
            wkv_b = self.wkv_b.weight.unflatten(0, (self.n_heads, -1))
            q_nope = torch.einsum("bshd,hdc->bshc", q_nope, wkv_b[:, : self.qk_nope_head_dim])
            scores = (scores + torch.einsum("bshc,btc->bsht", q_nope, latent)) * self.softmax_scale
        if mask is not None:
            scores = scores + mask.unsqueeze(1)
        scores = scores.softmax(-1, dtype=torch.float32).type_as(x)
        if attn_impl == "naive":
            out = torch.einsum("bsht,bthd->bshd", scores, v)
        else:
            out = torch.einsum("bsht,btc->bshc", scores, latent)
            out = torch.einsum("bshc,hdc->bshd", out, wkv_b[:, -self.v_head_dim :])
        return self.wo(out.flatten(2))


class MLP(nn.Module):
    def __init__(self, dim, inter_dim):
        super().__init__()
        self.w1 = ColumnParallelLinear(dim, inter_dim)
        self.w2 = RowParallelLinear(inter_dim, dim)
        self.w3 = ColumnParallelLinear(dim, inter_dim)

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Gate(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.topk, self.n_groups, self.topk_groups = (
            args.n_activated_experts, args.n_expert_groups, args.n_limited_groups,
        )  # fmt: skip
        self.score_func, self.route_scale = args.score_func, args.route_scale
        self.weight = nn.Parameter(torch.empty(args.n_routed_experts, args.dim))
        self.bias = nn.Parameter(torch.empty(args.n_routed_experts))

    def forward(self, x):
        scores = linear(x, self.weight).sigmoid()
        choice = (scores + self.bias).view(x.size(0), self.n_groups, -1)
        groups = choice.topk(2, -1)[0].sum(-1).topk(self.topk_groups, -1)[1]
        dropped = torch.ones(x.size(0), self.n_groups, dtype=torch.bool).scatter_(1, groups, False)
        indices = choice.masked_fill(dropped[..., None], -torch.inf).flatten(1).topk(self.topk, -1)[1]
        weights = scores.gather(1, indices)
        return weights / weights.sum(-1, keepdim=True) * self.route_scale, indices


class Expert(nn.Module):
    def __init__(self, dim, inter_dim):
        super().__init__()
        self.w1, self.w2, self.w3 = Linear(dim, inter_dim), Linear(inter_dim, dim), Linear(dim, inter_dim)

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.dim, self.n_routed_experts = args.dim, args.n_routed_experts
        self.gate = Gate(args)
        self.experts = nn.ModuleList(Expert(args.dim, args.moe_inter_dim) for _ in range(args.n_routed_experts))
        self.shared_experts = MLP(args.dim, args.n_shared_experts * args.moe_inter_dim)

    def forward(self, x):
        shape = x.size()
        x = x.view(-1, self.dim)
        weights, indices = self.gate(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=self.n_routed_experts).tolist()
        for index, count in enumerate(counts):
            if count:
                row, place = torch.where(indices == index)
                y[row] += self.experts[index](x[row]) * weights[row, place, None]
        return (y + self.shared_experts(x)).view(shape)


class Block(nn.Module):
    def __init__(self, layer_id, args):
        super().__init__()
        self.attn = MLA(args)
        self.ffn = MLP(args.dim, args.inter_dim) if layer_id < args.n_dense_layers else MoE(args)
        self.attn_norm, self.ffn_norm = RMSNorm(args.dim), RMSNorm(args.dim)

    def forward(self, x, start_pos, freqs_cis, mask):
        x = x + self.attn(self.attn_norm(x), start_pos, freqs_cis, mask)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        Linear.dtype = torch.float8_e4m3fn if args.dtype == "fp8" else torch.bfloat16
        self.max_seq_len = args.max_seq_len
        self.embed = ParallelEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(layer_id, args) for layer_id in range(args.n_layers))
        self.norm = RMSNorm(args.dim)
        self.head = ColumnParallelLinear(args.dim, args.vocab_size, dtype=torch.get_default_dtype())
        self.register_buffer("freqs_cis", frequencies(args), persistent=False)

    @torch.inference_mode()
    def forward(self, tokens, start_pos=0):
        length = tokens.size(1)
        h = self.embed(tokens)
        freqs_cis = self.freqs_cis[start_pos : start_pos + length]
        mask = torch.full((length, length), -torch.inf).triu_(1) if length > 1 else None
        for layer in self.layers:
            h = layer(h, start_pos, freqs_cis, mask)
        return self.head(self.norm(h)[:, -1])
