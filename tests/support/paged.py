"""Tiny programs whose cache is in pages, and running them step by step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxquant import ops
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.lowering.ascend.emitted.cache import Cache, Step
from fxquant.models import DecoderLayer
from fxquant.models.deepseek_v3 import MLA
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.npu.absorb_latents import AbsorbLatents
from fxquant.passes.npu.page_latents import PageLatents
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program, parse_program
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.runtime.weight_providers import Read

RANK, ROPE = 32, 8
"""kv_lora_rank and qk_rope_head_dim of the tiny models."""

CALLS = [[5, 3, 7], [2, 0, 6], [1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]]
"""New tokens of three sequences in each call: two of prefill, then single tokens."""


def tokens(counts: list[int], seed: int) -> list[list[int]]:
    """That many random ids a sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(100, (count,), generator=generator).tolist() for count in counts]


def rows(new: list[list[int]], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Ids and positions [B, S] of new tokens after `lengths` ones, filled up with 0 and -1."""
    steps = max(map(len, new))
    ids = [own + [0] * (steps - len(own)) for own in new]
    starts = zip(new, lengths, strict=True)
    positions = [[*range(start, start + len(own)), *[-1] * (steps - len(own))] for own, start in starts]
    return torch.tensor(ids), torch.tensor(positions)


def copy(program: Program) -> Program:
    return parse_program(dump_program(program), "a copy")


def paged(program: Program, *passes: Pass) -> tuple[Program, list[PassResult]]:
    """A copy over pages, and what the passes said."""
    other = copy(program)
    PageLatents()(other)
    return other, [program_pass(other) for program_pass in passes]


def absorbed(program: Program) -> Program:
    return paged(program, AbsorbLatents())[0]


@dataclass
class PagedRun:
    """Sequences and their cache: each call adds tokens to some of them."""

    read: Read
    cache: Cache
    sequences: list[list[int]]
    latents: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.latents = [torch.cat([page.squeeze(2) for page in pair], -1) for pair in self.cache.pages]

    def prefill(self, program: Program, new: list[list[int]]) -> list[Tensor]:
        ids, positions = rows(new, self.cache.lengths)
        return self._call(program, new, ids, self.cache.prefill_step(positions))

    def decode(self, program: Program, new: list[list[int]]) -> list[Tensor]:
        ids, positions = rows(new, self.cache.lengths)
        return self._call(program, new, ids, self.cache.decode_step(positions))

    def _call(self, program: Program, new: list[list[int]], ids: Tensor, step: Step) -> list[Tensor]:
        """The logits of the new tokens of each sequence."""
        lens = torch.tensor(step.seq_lens, dtype=torch.int32)
        inputs = [ids, step.attention_mask, step.position_ids, *self.latents, step.block_table, step.slot_mapping, lens]
        logits, *self.latents = execute(program, self.read, [inputs])[0]
        self.cache.advance(step)
        for sequence, own in zip(self.sequences, new, strict=True):
            sequence.extend(own)
        return [row[: len(own)] for row, own in zip(logits, new, strict=True)]


def empty_pages(blocks: int, block_size: int, layers: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Filled with numbers that must never be read."""
    shape = (blocks, block_size, 1)
    return [(torch.full((*shape, RANK), 1e3), torch.full((*shape, ROPE), 1e3)) for _ in range(layers)]


def forward_logits(program: Program, read: Read, sequence: list[int]) -> Tensor:
    """float32 [length, vocabulary] of the whole sequence at once."""
    return execute(program, read, [prefill_inputs(program, torch.tensor([sequence]))])[0][0][0]


class NormOfAll(MLA):
    """The latents' norm is between the cache and the keys."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor]:
        widths = [self.config.kv_lora_rank, self.config.qk_rope_head_dim]
        q = ops.rope(self.queries(x), cos, sin, self.config.num_attention_heads)
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split(widths, -1)
        present = torch.cat((past, torch.cat((c_kv, ops.rope(k_rope, cos, sin, 1)), -1)), 1)
        c_kv, k_rope = present.split(widths, -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(c_kv))
        heads, width = self.config.num_attention_heads, self.config.v_head_dim
        return self.o_proj(ops.mla_attention(q, kv, k_rope, attention_mask, heads, width, self.softmax_scale)), present


class LateNorm(DecoderLayer):
    """Caches latents before their norm, as some models do."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        self.self_attn.__class__ = NormOfAll
