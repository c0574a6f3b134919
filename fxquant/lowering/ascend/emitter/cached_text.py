"""Methods of the emitted `Model` that run over a paged cache."""

from fxquant.lowering.ascend.cached_graphs import Cached, latent_parts
from fxquant.lowering.ascend.calls import INDENT
from fxquant.lowering.ascend.emitter.forward import forward_lines

METHODS = '''\
    def empty_pages(self, num_blocks: int, block_size: int = 128, device: str = "cpu") -> list[Pages]:
        """Pages of a cache, two tensors per layer. Devices take blocks of 16 to 1024 positions."""
        shape, parts = (num_blocks, block_size, 1), {parts}
        pages = [[torch.zeros(*shape, width, dtype=self.dtype, device=device) for width in pair] for pair in parts]
        return [(c_kv, k_rope) for c_kv, k_rope in pages]

    def paged_cache(self, sequences: int, num_blocks: int, block_size: int = 128, device: str = "cpu") -> Cache:
        """A cache of `num_blocks` pages, which sequences take as they grow."""
        return Cache.paged(self.empty_pages(num_blocks, block_size, device), sequences)

    def contiguous_cache(self, sequences: int, length: int, block_size: int = 128, device: str = "cpu") -> Cache:
        """A cache for `length` positions per sequence, in whole blocks that are contiguous in memory."""
        num_blocks = sequences * -(-length // block_size)
        return Cache.contiguous(self.empty_pages(num_blocks, block_size, device), sequences)

    def prefill(self, input_ids: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
        """Add tokens to the sequences of `cache`: a prompt, or the next piece of one.

        input_ids, position_ids int64 [B, S]: each row's positions continue from its sequence's length, padded with -1
        -> logits [B, S, vocabulary], meaningless at -1.
        """
        step = cache.prefill_step(position_ids)
        arguments = step.attention_mask, step.position_ids, cache.pages, step.block_table, step.slot_mapping
        logits = self.run_prefill(input_ids, *arguments, step.seq_lens)
        cache.advance(step)
        return logits

    def decode(self, input_ids: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
        """Add one token to each sequence: `prefill` for S = 1, in the form that is faster for one token."""
        if input_ids.shape[1] != 1:
            raise ValueError(f"decode takes one token per sequence, not {{input_ids.shape[1]}}; prefill takes many")
        step = cache.decode_step(position_ids)
        arguments = step.attention_mask, step.position_ids, cache.pages, step.block_table, step.slot_mapping
        logits = self.run_decode(input_ids, *arguments, step.seq_lens)
        cache.advance(step)
        return logits

    @torch.no_grad()
    def run_prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        pages: list[Pages],
        block_table: Tensor,
        slot_mapping: Tensor,
        seq_lens: list[int],
    ) -> Tensor:
        """The graph of `prefill`; arguments: `Step`. Writes into `pages`."""
{prefill}

    @torch.no_grad()
    def run_decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        pages: list[Pages],
        block_table: Tensor,
        slot_mapping: Tensor,
        seq_lens: list[int],
    ) -> Tensor:
        """The graph of `decode`; arguments: `Step`. Writes into `pages`."""
{decode}
'''


def model_methods(prefill: Cached, decode: Cached) -> str:
    """Source of the methods, indented as in the class."""
    parts = latent_parts(decode.program)
    text = f"[{parts[0]}] * {len(parts)}" if len(set(parts)) == 1 else repr(parts)
    return METHODS.format(parts=text, prefill=_body(prefill), decode=_body(decode))


def _body(graph: Cached) -> str:
    return "\n".join(2 * INDENT + line for line in forward_lines(graph.program, graph.emitted))
