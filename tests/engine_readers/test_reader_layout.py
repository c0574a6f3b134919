"""Each step from stored bytes to the layout of the device, element by element."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from reader_folders import Draft, pack
from torch import Tensor

from fxquant.engine_readers.int4_terms import TwoLevel
from fxquant.engine_readers.packed_layout import PackedLayout, pack_layout, unpack_words


def layout_of(q: Tensor, second: Tensor | None = None, columns: int = 1) -> PackedLayout:
    scale = torch.arange(1, len(q) + 1) * 2.0**-9
    return pack_layout(pack(q), TwoLevel(scale, second), torch.ones(len(q), columns))


def word_by_hand(q: Tensor, k: int, word: int) -> int:
    """The eight codes of one word, lowest n in the lowest nibble, as a signed 32-bit number."""
    unsigned = sum((int(q[8 * word + i, k]) & 15) << 4 * i for i in range(8))
    return unsigned - 2**32 if unsigned >= 2**31 else unsigned


def test_a_byte_holds_two_rows_low_nibble_first() -> None:
    assert pack(torch.tensor([[1], [-2]])).tolist() == [[-31]]  # 0xE1


@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31))
def test_words_hold_eight_consecutive_outputs(words: int, k: int, seed: int) -> None:
    q = torch.randint(-8, 8, (8 * words, k), generator=torch.Generator().manual_seed(seed))
    loaded = layout_of(q).words
    assert loaded.dtype is torch.int32 and loaded.shape == (k, words)
    assert loaded.tolist() == [[word_by_hand(q, row, word) for word in range(words)] for row in range(k)]
    assert torch.equal(unpack_words(loaded).long(), q.T)


def test_combined_scales_are_rounded_to_float16_and_lie_in_the_low_word() -> None:
    second = torch.tensor([[3.0, 17.0]]).repeat(8, 1)
    channel = torch.tensor([0.1, 1 / 3, 2.0**-14, 1e-7, 0.0, 5.0, 1.0, 0.7])
    scale = pack_layout(pack(torch.zeros(8, 4, dtype=torch.long)), TwoLevel(channel, second), torch.ones(8, 1)).scale
    assert scale.dtype is torch.int64 and scale.shape == (2, 8)
    for group, factor in enumerate((3.0, 17.0)):
        for n, value in enumerate(channel):
            rounded = (value * factor).half().float()
            assert int(scale[group, n]) == int(rounded.view(torch.int32)), "zero-extended, high word 0"


def test_channel_scales_keep_all_their_bits() -> None:
    scale = layout_of(torch.zeros(8, 4, dtype=torch.long)).scale
    assert scale.shape == (1, 8)
    assert torch.equal(scale[0].to(torch.int32).view(torch.float32), torch.arange(1, 9) * 2.0**-9)


def test_scale_bias_is_summed_over_the_columns_of_the_rank() -> None:
    packed = pack(torch.zeros(8, 4, dtype=torch.long))
    columns = torch.arange(32.0).view(8, 4)
    assert pack_layout(packed, TwoLevel(torch.ones(8), None), columns).scale_bias.tolist() == [
        sum(4.0 * n + i for i in range(4)) for n in range(8)
    ]


def test_codes_of_two_levels_are_multiplied_by_their_groups_scale() -> None:
    draft = Draft()
    draft.expert("m", 8, 6, 2, 1)
    second = draft.tensors["m.weight_scale_second"]
    scales = TwoLevel(torch.ones(8), second)
    layout = pack_layout(draft.tensors["m.weight"], scales, draft.tensors["m.scale_bias"])
    q, steps = layout.codes(slice(2, 6)), layout.scales.rows(slice(2, 6)).steps()
    for row in range(4):
        for k in range(6):
            assert int(q[row, k] * steps[row, k // 2]) == int(draft.truths["m"].codes[row + 2, k])


@given(st.floats(2.0**-24, 100.0, width=32), st.integers(1, 17))
def test_the_error_of_a_combined_scale_is_within_its_bound(channel: float, group: int) -> None:
    scales = TwoLevel(torch.tensor([channel]), torch.tensor([[float(group)]]))
    exact = torch.tensor([[channel]], dtype=torch.float64) * group
    assert (scales.combined().double() - exact).abs() <= scales.error()
