"""Pairs of real tensors do what complex numbers do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant import ops
from fxquant.frontend.own.rotary_pairs import Table, rows


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_a_rotation_by_pairs_is_that_by_complex_numbers(batch: int, length: int, heads: int, half: int) -> None:
    frequencies = [1 / (index + 1) for index in range(half)]
    positions = torch.arange(length).expand(batch, length)
    cos, sin = ops.rope_table(positions, frequencies, 1.0)
    x = torch.randn(batch, length, heads, 2 * half, generator=torch.Generator().manual_seed(0))
    complex_x = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    angles = torch.outer(torch.arange(length).float(), torch.tensor(frequencies))
    expected = torch.view_as_real(complex_x * torch.polar(torch.ones_like(angles), angles)[None, :, None]).flatten(-2)
    for table in (
        rows(cos, sin).view(1, length, 1, half),
        rows(cos, sin)[None, :, None],
        Table(rows(cos, sin))[0:length][None, :, None],
    ):
        got = torch.view_as_real(complex_x * table).flatten(-2)
        torch.testing.assert_close(got, expected, rtol=0, atol=2**-20)  # two roundings of products below 4


@pytest.mark.parametrize("read", [lambda r: r.view(2, 3), lambda r: r[0], lambda r: r.unsqueeze(1), torch.exp])
def test_what_pairs_cannot_do_is_said(read: object) -> None:
    table = rows(torch.ones(1, 3, 4), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="rotary table"):
        read(table)  # type: ignore[operator]
