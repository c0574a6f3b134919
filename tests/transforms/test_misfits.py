"""Transforms of another model: refused by shape, and nothing else is called a misfit."""

from typing import Any

import pytest
import torch

from fxquant import FxquantError
from fxquant.transforms.rotation import Rotation
from fxquant.transforms.weight_transforms import WeightTransforms

MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "columns": ({"scales": {"n": torch.ones(7)}, "columns": {"w": "n"}}, "7 scales of columns"),
    "rows": ({"scales": {"w": torch.ones(9)}, "rows": {"w": 1}}, "9 scales of rows in 1 heads"),
    "heads": ({"scales": {"w": torch.ones(6)}, "rows": {"w": 3}}, "6 scales of rows in 3 heads"),
    "parts": ({"rotations": {"w": Rotation(columns=3)}}, "rotations of 3 equal parts of columns"),
    "values": ({"rotations": {"w": Rotation(heads=2, values=8)}}, "rotations of 8 rows in each of 2 heads"),
    "no values": ({"rotations": {"w": Rotation(heads=2)}}, "rotations of 0 rows in each of 2 heads"),
    "order": ({"rotations": {"w": Rotation(heads=1, values=3)}}, "no Hadamard matrix of order 3"),
    "norm": ({"rotations": {"w": Rotation(1, "n")}, "norms": {"n": torch.ones(5)}}, "a norm of 5"),
}


@pytest.mark.parametrize(("fields", "reason"), MISFITS.values(), ids=MISFITS)
def test_transforms_for_another_shape_are_refused(fields: dict[str, Any], reason: str) -> None:
    transforms = WeightTransforms(**fields)
    with pytest.raises(FxquantError, match=reason) as refused:
        transforms.apply("w", torch.ones(8, 4), 8)
    assert refused.value.place == "tensor w" and "[8, 4]" in refused.value.fact
    assert torch.equal(transforms.apply("other", torch.ones(8, 4), 8), torch.ones(8, 4))


def test_a_vector_has_no_rows_to_smooth() -> None:
    with pytest.raises(FxquantError, match="they are for a matrix"):
        WeightTransforms(**MISFITS["columns"][0]).apply("w", torch.ones(7), 7)


def test_what_fails_otherwise_comes_out_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out is no misfit."""

    def exhausted(*arguments: object) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr("fxquant.transforms.rotation.rotated", exhausted)
    with pytest.raises(RuntimeError, match="not enough memory"):
        WeightTransforms(rotations={"w": Rotation(columns=1)}).apply("w", torch.ones(8, 4), 8)
