"""Tensors in runs of a larger stored one: their ranges and what is read, against indexing of the whole."""

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fxquant.storage.safetensors import read_header
from fxquant.storage.sliced_tensor import Runs, SlicedTensor


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.data())
def test_ranges_are_the_bytes_between(run: int, count: int, gap: int, data: st.DataObject):
    runs = Runs("stack", 100, 7, run, run + gap)
    every = [7 + index * (run + gap) + byte for index in range(count) for byte in range(run)]
    offset = data.draw(st.integers(0, run * count))
    length = data.draw(st.integers(0, run * count - offset))
    got = [start + byte for start, size in runs.ranges(offset, length) for byte in range(size)]
    assert got == every[offset : offset + length]


def test_rows_of_two_alternate(tmp_path: Path):
    stack = torch.arange(3 * 8 * 5, dtype=torch.int32).view(3, 8, 5)
    save_file({"other": torch.zeros(3, dtype=torch.int8), "stack": stack}, tmp_path / "w.safetensors")
    info = read_header(tmp_path / "w.safetensors")["stack"]
    for expert in range(3):
        for index in range(2):
            runs = Runs("stack", info.nbytes, expert * 160 + index * 20, 20, 40)
            part = SlicedTensor("part", (4, 5), info, runs)
            assert part.dtype is torch.int32 and part.nbytes == 80
            assert torch.equal(part.read(), stack[expert, index::2])
            read = b"".join(bytes(info.read_bytes(start, size)) for _, start, size in part.ranges(8, 60))
            assert read == stack[expert, index::2].contiguous().numpy().tobytes()[8:68]
