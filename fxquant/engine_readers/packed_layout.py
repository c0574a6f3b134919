"""Packed int4 layout of vllm-ascend on the device: words, combined scales, scale_bias.

The steps are those of vllm-ascend's `process_weights_after_loading` for routed experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.engine_readers.arithmetic import float32_bits
from fxquant.engine_readers.int4_terms import TwoLevel

NIBBLES_PER_WORD = 8


@dataclass(frozen=True)
class PackedLayout:
    """One expert's w13 or w2 on one rank; n counts both halves of w13.

    words         int32 [k, n / 8]: eight consecutive n, the lowest in the lowest nibble, two's complement
    scale         int64 [G, n]: low word the bits of the combined float32 scale, high word 0
    bias_columns  float32 [n, c]: the rank's columns of scale_bias; the engine sums them, `scale_bias`
    scales        the stored scales, of which `scale` was made
    """

    words: Tensor
    scale: Tensor
    bias_columns: Tensor
    scales: TwoLevel

    @property
    def scale_bias(self) -> Tensor:
        """float32 [n], as the operator gets it."""
        return self.bias_columns.sum(1)

    def codes(self, part: slice) -> Tensor:
        """int8 [n', k] of some output features."""
        return unpack_words(self.words)[:, part].T.contiguous()

    def combined(self, part: slice) -> Tensor:
        """float32 [n', G] of some output features."""
        return float32_bits(self.scale)[:, part].T.contiguous()


def pack_layout(packed: Tensor, scales: TwoLevel, bias_columns: Tensor) -> PackedLayout:
    """Bytes int8 [n / 2, k], two consecutive n each → the layout: transposed, then four bytes to a word; n % 8 == 0."""
    words = packed.T.flatten().view(torch.int32).unflatten(0, (packed.shape[1], -1))
    combined = scales.combined().T.contiguous()
    scale = combined.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return PackedLayout(words, scale, bias_columns, scales)


def unpack_words(words: Tensor) -> Tensor:
    """int32 [k, n / 8] → int8 [k, n] in [-8, 7]."""
    codes = torch.empty(*words.shape, NIBBLES_PER_WORD, dtype=torch.int8)
    for nibble in range(NIBBLES_PER_WORD):  # shift to the top of the word, then back with its sign
        codes[..., nibble] = words << 4 * (NIBBLES_PER_WORD - 1 - nibble) >> 28
    return codes.flatten(1)
