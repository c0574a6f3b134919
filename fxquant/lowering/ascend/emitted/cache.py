"""Paged latent cache of an emitted module: pages on the device, their owners on the host.

The emitter copies the source of these classes into the module that it writes. B sequences, S new positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Pages = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Step:
    """Arguments of one call besides its tokens.

    attention_mask  int64 [B, blocks * block_size + S]: 1 where a position of the block table, or a new one, is valid
    position_ids    int64 [B, S], 0 where there is no token
    block_table     int32 [B, blocks]: the pages of each sequence in order
    slot_mapping    int32 [B, S]: page * block_size + row of each new position, -1 where there is no token
    seq_lens        positions of each sequence, the new ones included
    """

    attention_mask: Tensor
    position_ids: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    seq_lens: list[int]


class Cache:
    """Latents of B sequences of any lengths. A new position goes into the next row of its sequence's last page.

    pages    one pair per layer: [num_blocks, block_size, 1, width], for the two parts of a latent
    blocks   the pages of each sequence, in order
    free     unused pages; sequences take from its end as they grow
    lengths  positions that each sequence holds
    """

    def __init__(self, pages: list[Pages], blocks: list[list[int]], free: list[int]) -> None:
        self.pages, self.blocks, self.free = pages, blocks, free
        self.lengths = [0] * len(blocks)
        self.block_size = pages[0][0].shape[1]
        self._shared = bool(free)

    @classmethod
    def paged(cls, pages: list[Pages], sequences: int) -> "Cache":
        """A cache whose sequences take pages when they need them and return them in `release`."""
        return cls(pages, [[] for _ in range(sequences)], list(range(len(pages[0][0])))[::-1])

    @classmethod
    def contiguous(cls, pages: list[Pages], sequences: int) -> "Cache":
        """A cache whose sequences each own an equal number of pages, contiguous in memory."""
        each = len(pages[0][0]) // sequences
        return cls(pages, [list(range(row * each, (row + 1) * each)) for row in range(sequences)], [])

    def prefill_step(self, position_ids: Tensor) -> Step:
        """For a call that gathers the cached positions: the block table covers these, without the new ones.

        position_ids int64 [B, S]: each row continues from the sequence's length, padded with -1.
        """
        return self._step(position_ids, self.lengths)

    def decode_step(self, position_ids: Tensor) -> Step:
        """For a call that writes before it reads: the block table covers the new positions too."""
        return self._step(position_ids, self._grown(position_ids))

    def advance(self, step: Step) -> None:
        """Count the new positions, after a call has written them."""
        self.lengths = list(step.seq_lens)

    def release(self, sequence: int) -> None:
        """Drop a sequence; another may start in its place."""
        self.lengths[sequence] = 0
        if self._shared:
            self.free += self.blocks[sequence][::-1]
            self.blocks[sequence] = []

    def _grown(self, position_ids: Tensor) -> list[int]:
        """Positions of each sequence, the new ones included."""
        counts, steps = (position_ids >= 0).sum(1).cpu(), torch.arange(position_ids.shape[1])
        lengths = torch.tensor(self.lengths)
        known = len(counts) == len(lengths)
        expected = torch.where(steps < counts[:, None], lengths[:, None] + steps, -1) if known else counts
        if not torch.equal(position_ids.cpu(), expected):
            raise ValueError(f"position_ids do not continue from {self.lengths}, with -1 at the end of shorter rows")
        return (lengths + counts).tolist()

    def _step(self, position_ids: Tensor, reach: list[int]) -> Step:
        """`reach`: how many positions of each sequence the block table must cover."""
        seq_lens, size, device = self._grown(position_ids), self.block_size, self.pages[0][0].device
        self._grow(seq_lens)
        table, positions = self._table(max(-(-length // size) for length in seq_lens)), position_ids.cpu()
        places = positions.clamp(min=0)
        slots = table.long().gather(1, places // size) * size + places % size if table.shape[1] else places
        slots = torch.where(positions < 0, -1, slots).int()
        table = table[:, : max(-(-length // size) for length in reach)]
        held = torch.arange(table.shape[1] * size) < torch.tensor(self.lengths)[:, None]
        mask = torch.cat((held, positions >= 0), 1).long()
        return Step(mask.to(device), places.to(device), table.to(device), slots.to(device), seq_lens)

    def _grow(self, lens: list[int]) -> None:
        for row, length in enumerate(lens):
            while len(self.blocks[row]) * self.block_size < length:
                if not self.free:
                    raise ValueError(f"sequence {row} of {length} positions needs a page, but none is free")
                self.blocks[row].append(self.free.pop())

    def _table(self, columns: int) -> Tensor:
        """int32 [B, columns]; page 0 where a sequence has no page."""
        rows = [(blocks + [0] * columns)[:columns] for blocks in self.blocks]
        return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), columns)
