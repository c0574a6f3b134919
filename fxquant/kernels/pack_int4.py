"""Packing of existing int4 codes, and their scale_bias; `int4.py` makes packed codes from a weight."""

import torch
from torch import Tensor


def pack_int4(q4: Tensor) -> Tensor:
    """int8 [n, k] in [-8, 7] → int8 [n/2, k]: row 2i in the low nibble, row 2i + 1 in the high one."""
    return (q4[0::2] & 0xF) | (q4[1::2] << 4)


def pack_blocks(q4: Tensor) -> Tensor:
    """int8 [n, k] in [-8, 7] → uint8 [n, k/2]: codes + 8, column 2i in the low nibble, 2i + 1 in the high one."""
    shifted = (q4 + 8).view(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def unpack_blocks(packed: Tensor) -> Tensor:
    """The inverse of `pack_blocks`."""
    return torch.stack((packed & 0xF, packed >> 4), 2).flatten(1).view(torch.int8) - 8


def scale_bias(q4: Tensor, scale: Tensor, second: Tensor | None, chunks: int) -> Tensor:
    """float32 [n, chunks]: `8 * scale * sum of q4 * second` over each of `chunks` equal chunks of k.

    Int4 matmul kernels split an int8 activation into two signed nibbles, `x = 16 hi + lo + 8`; this is the term of the
    8. With a second scale, the format rounds `scale` to bfloat16 first; the sum itself is exact.
    """
    codes = q4.to(torch.int32)
    if second is not None:
        codes = codes * second.to(torch.int32).repeat_interleave(q4.shape[1] // second.shape[1], 1)
        scale = scale.bfloat16()
    sums = codes.unflatten(1, (chunks, -1)).sum(-1)
    return (8 * scale.double() * sums.double()).float()
