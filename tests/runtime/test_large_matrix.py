"""Large matrices: products, rows and everything else as with the tensor, and what is read for them."""

from pathlib import Path

import pytest
import torch
from tiny import write_checkpoint

from fxquant import ops
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.runtime import large_matrix
from fxquant.runtime.large_matrix import LargeMatrix, with_large_matrices

ROWS, COLUMNS = 100, 16


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randint(-8, 8, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0)).bfloat16()


def test_blocks_of_rows_are_read_in_turn(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_matrix, "NUMBERS", 24 * COLUMNS)
    read: list[tuple[int, int]] = []
    large = LargeMatrix(lambda start, end: read.append((start, end)) or weight[start:end], weight.shape, torch.float32)
    x, bias = torch.randn(2, 3, COLUMNS).round(), torch.arange(ROWS).float()  # whole numbers: sums are exact
    expected = x @ weight.float().T
    assert torch.equal(torch.nn.functional.linear(x, large, bias), expected + bias)  # type: ignore[arg-type]
    assert read == [(start, min(start + 24, ROWS)) for start in range(0, ROWS, 24)]
    assert torch.equal(ops.linear(x, large, None), expected) and torch.equal(ops.router_logits(x, large), expected)


def test_an_embedding_reads_the_rows_of_its_tokens_once(weight: torch.Tensor) -> None:
    read: list[tuple[int, int]] = []
    large = LargeMatrix(lambda start, end: read.append((start, end)) or weight[start:end], weight.shape, torch.bfloat16)
    ids = torch.tensor([[7, 3, 7], [99, 0, 3]])
    assert torch.equal(ops.embedding(large, ids), weight[ids])
    assert torch.equal(torch.nn.functional.embedding(ids, large), weight[ids])  # type: ignore[arg-type]
    assert read == 2 * [(0, 1), (3, 4), (7, 8), (99, 100)]


def test_other_functions_and_methods_get_the_tensor(weight: torch.Tensor) -> None:
    large = LargeMatrix(lambda start, end: weight[start:end], weight.shape, torch.bfloat16)
    assert torch.equal(torch.mul(large, 2), weight * 2)  # type: ignore[arg-type]
    assert torch.equal(large.float().unflatten(0, (4, -1)), weight.float().unflatten(0, (4, -1)))


def test_rows_of_a_checkpoint_are_those_of_the_whole_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 rows that begin inside a block of scales too."""
    monkeypatch.setattr(large_matrix, "WHOLE", 0)
    for fp8 in (False, True):
        checkpoint = open_checkpoint(write_checkpoint(tmp_path / str(fp8), fp8=fp8, intermediate_size=320))
        read = with_large_matrices(checkpoint.read, checkpoint.tensors, checkpoint.read_rows)
        for name in checkpoint.tensors:
            whole = checkpoint.read(name)
            if whole.ndim == 2 and checkpoint.tensors[name].dtype.is_floating_point:
                assert isinstance(read(name), LargeMatrix)
                assert torch.equal(checkpoint.read_rows(name, 3, len(whole) - 1), whole[3:-1]), name
