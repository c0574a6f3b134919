"""A shape rule runs once a signature, and gives what it gives without memory."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fxquant import ops
from fxquant.program.shape_inference import ShapeRules

ATEN = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_one_result_a_signature() -> None:
    rules = ShapeRules()
    result = rules.call(ops.linear, (meta(2, 3, 8), meta(4, 8)))
    assert result.shape == (2, 3, 4) and result.is_meta
    assert rules.call(ops.linear, (meta(2, 3, 8), meta(4, 8))) is result


@pytest.mark.parametrize(
    ("target", "args", "other"),
    [
        (ATEN.mul.Tensor, (meta(2, 3), meta(2, 3)), (meta(2, 3), meta(2, 3, dtype=torch.float64))),
        (ATEN.mul.Tensor, (meta(2, 3), meta(2, 3)), (meta(2, 3), meta(5, 2, 3))),
        (ATEN.clone.default, (meta(2, 3),), (meta(3, 2).t(),)),
        (ATEN.mul.Tensor, (meta(2, dtype=torch.int64), 1), (meta(2, dtype=torch.int64), 1.0)),
        (ATEN.sum.dim_IntList, (meta(2, 3), [0]), (meta(2, 3), [1])),
    ],
    ids=["dtype", "shape", "stride", "type of a number", "list"],
)
def test_what_a_rule_sees_is_in_the_signature(target: object, args: tuple, other: tuple) -> None:
    rules = ShapeRules()
    for arguments in (args, other, args):
        result, expected = rules.call(target, arguments), target(*arguments)
        assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_keywords_count_and_factories_stay_on_meta() -> None:
    rules = ShapeRules()
    double = rules.call(ATEN.zeros.default, ([2, 3],), {"dtype": torch.float64})
    single = rules.call(ATEN.zeros.default, ([2, 3],), {})
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    assert double.is_meta and single.is_meta


def test_an_error_is_raised_each_time() -> None:
    rules = ShapeRules()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="x has 8 features, weight 9"):
            rules.call(ops.linear, (meta(2, 8), meta(4, 9)))


def test_symbols_of_two_traces_are_told_apart() -> None:
    rules, modes = ShapeRules(), (FakeTensorMode(), FakeTensorMode())
    fakes = [rules.fake(meta(2, 3), mode) for mode in modes]
    assert [fake.fake_mode for fake in fakes] == list(modes)
    assert rules.fake(meta(2, 3), modes[0]) is fakes[0]
    assert rules.call(ATEN.neg.default, (fakes[0],)).fake_mode is modes[0]
    assert rules.call(ATEN.neg.default, (fakes[1],)).fake_mode is modes[1]
