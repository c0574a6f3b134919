"""Hadamard matrices, ±1 / √n, and rotation of vectors by them in n log n additions, always in the same order.

Sylvester's construction doubles the order. If n is not a power of two it starts from an order m of Paley's (R. Paley,
On orthogonal matrices, 1933): m = p + 1 for a prime p of the form 4j + 3, m = 2p + 2 for one of the form 4j + 1. For
example, 7168 is 28 = 2·13 + 2, doubled eight times.
"""

import random
from functools import cache

import torch
from torch import Tensor


class NoHadamardError(ValueError):
    """No Hadamard matrix of this order can be constructed here."""


def rotated(x: Tensor) -> Tensor:
    """`x @ Q` for x float32 [r, n] with Q = diag(signs) H / √n. Raises NoHadamardError.

    Without the random signs a common component of all values, such as their mean, would end up in one single result.
    """
    rows, n = x.shape
    start = base_order(n)
    x = x * signs(n)
    if start > 1:
        x = _times(x.view(rows, start, -1), hadamard(start))
    width = n // start
    while width > 1:
        halves = x.reshape(rows, -1, 2, width // 2)
        low, high = halves[:, :, 0], halves[:, :, 1]
        x, width = torch.stack((low + high, low - high), 2), width // 2
    return x.reshape(rows, n) * n**-0.5


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """x [r, m, w] times ±1 [m, m] along the middle axis, terms added in order."""
    total = torch.zeros_like(x)  # no matmul: its order of summation, and so the last bits, vary between machines
    for index, row in enumerate(matrix):
        total += x[:, index : index + 1] * row.view(1, -1, 1)
    return total


@cache
def signs(n: int) -> Tensor:
    """float32 [n] of ±1, the same in every run."""
    bits = random.Random(n).getrandbits(n)
    return torch.tensor([1.0 if bits >> index & 1 else -1.0 for index in range(n)])


def base_order(n: int) -> int:
    """The order from which doubling reaches n: 1, or the smallest of Paley's. Raises NoHadamardError."""
    odd = n // (n & -n)
    if odd == 1:
        return 1
    start = 4 * odd  # Hadamard matrices above order 2 exist for multiples of 4 only
    while n % start == 0:
        if _first_prime(start) or _second_prime(start):
            return start
        start *= 2
    raise NoHadamardError(f"no Hadamard matrix of order {n} can be constructed")


@cache
def hadamard(m: int) -> Tensor:
    """float32 ±1 [m, m], `H @ H.T = m I`, for an m returned by `base_order`."""
    if m == 1:
        return torch.ones(1, 1)
    if p := _first_prime(m):
        matrix = _bordered(p, -1) + torch.eye(m)
    else:
        square, corner = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
        matrix = torch.kron(_bordered(_second_prime(m), 1), square) + torch.kron(torch.eye(m // 2), corner)
    return matrix


def _bordered(p: int, left: int) -> Tensor:
    """Jacobsthal's matrix of p, χ(i - j) at i, j, with a row of ones above it and a column of `left` at its left."""
    squares = {i * i % p for i in range(1, p)}
    rows = [[0.0] + [1.0] * p]
    rows += [[float(left)] + [_character((i - j) % p, squares) for j in range(p)] for i in range(p)]
    return torch.tensor(rows)


def _character(value: int, squares: set[int]) -> float:
    return 0.0 if value == 0 else 1.0 if value in squares else -1.0


def _first_prime(m: int) -> int:
    return m - 1 if m % 4 == 0 and _is_prime(m - 1) else 0


def _second_prime(m: int) -> int:
    p = m // 2 - 1
    return p if m % 4 == 0 and p % 4 == 1 and _is_prime(p) else 0


def _is_prime(p: int) -> bool:
    return p > 1 and all(p % divisor for divisor in range(2, int(p**0.5) + 1))
