"""Hadamard matrices in exact integers, and vectors rotated by them against the dense product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.transforms.hadamard import NoHadamardError, base_order, hadamard, rotated, signs

ORDERS = (1, 12, 20, 24, 28, 36, 44, 60, 104)
SIZES = (1, 2, 4, 12, 24, 28, 64, 96, 112, 128, 192, 448, 576)


def dense(n: int) -> Tensor:
    """Q [n, n] in float64: signs times a Kronecker product, written out."""
    matrix = hadamard(base_order(n)).double()
    while len(matrix) < n:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64))
    return signs(n).double().view(-1, 1) * matrix / n**0.5


@pytest.mark.parametrize("m", ORDERS)
def test_rows_are_orthogonal(m: int) -> None:
    matrix = hadamard(m).long()
    assert matrix.shape == (m, m) and (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, m * torch.eye(m, dtype=torch.int64))


@pytest.mark.parametrize(("n", "start"), [(1, 1), (4096, 1), (7168, 28), (12, 12), (48, 12), (104, 104), (1536, 12)])
def test_the_order_that_doubling_starts_from(n: int, start: int) -> None:
    assert base_order(n) == start


@pytest.mark.parametrize("n", [3, 6, 7, 52, 92, 7 * 23])
def test_no_matrix_is_an_error(n: int) -> None:
    with pytest.raises(NoHadamardError, match=f"order {n}"):
        base_order(n)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SIZES), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_rotated_is_the_dense_product(n: int, rows: int, seed: int) -> None:
    """Each result is n terms added in float32: no more than log2 of n plus 30 roundings of what is added so far."""
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    product, expected = rotated(x).double(), x.double() @ dense(n)
    bound = 64 * torch.finfo(torch.float32).eps * x.double().norm(dim=1, keepdim=True)
    assert ((product - expected).abs() <= bound).all()


@pytest.mark.parametrize("n", SIZES)
def test_the_matrix_is_orthogonal(n: int) -> None:
    matrix = dense(n)
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)  # sums of n squares


@given(st.sampled_from(SIZES), st.integers(1, 6), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_a_row_does_not_depend_on_those_beside_it(n: int, rows: int, first: int) -> None:
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(n))
    assert torch.equal(rotated(x)[first:], rotated(x[first:].contiguous()) if first < rows else x[:0])


def test_the_signs_are_always_the_same() -> None:
    assert signs(8).tolist() == [-1, 1, -1, 1, 1, 1, -1, -1]
    assert signs(7168).sum().abs() < 4 * 7168**0.5
