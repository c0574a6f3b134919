"""torch.ops.npu on CPU: norm and activation against plain loops and the fxq:: operators."""

import itertools
import math

import pytest
import torch
from ascend_calls import UNIT, floats, npu

from fxquant import ops


def test_rms_norm():
    x, gamma = floats(2, 3, 5), floats(5, seed=1)
    result, rstd = npu.npu_rms_norm(x, gamma, 1e-5)
    assert rstd.shape == (2, 3, 1)
    for index in itertools.product(range(2), range(3)):
        row = x[index].tolist()
        factor = 1 / math.sqrt(sum(value * value for value in row) / 5 + 1e-5)
        # Squares, their sum of 5, mean, + epsilon: 8 roundings under a root, then rsqrt (2 units) and two products.
        assert float(rstd[index]) == pytest.approx(factor, rel=7 * UNIT)
        for column, value in enumerate(row):
            assert float(result[*index, column]) == pytest.approx(value * factor * float(gamma[column]), rel=9 * UNIT)
    assert torch.equal(result, ops.rms_norm(x, gamma, 1e-5))
    with pytest.raises(ValueError, match="npu_rms_norm: gamma is torch.float32, the input torch.bfloat16"):
        npu.npu_rms_norm(x.bfloat16(), gamma)


@pytest.mark.parametrize("width", [3, 37, 64])
def test_swiglu(width: int):
    x = floats(5, 2 * width) * 4
    result = npu.npu_swiglu(x)
    for row, column in itertools.product(range(5), range(width)):
        gate, up = float(x[row, column]), float(x[row, width + column])
        # exp, 1 +, division and product round once each; exp is within 2 units.
        assert float(result[row, column]) == pytest.approx(gate / (1 + math.exp(-gate)) * up, rel=6 * UNIT)
    gate, up = (half.contiguous() for half in x.chunk(2, -1))
    assert torch.equal(result, ops.swiglu(gate, up))
    # In another memory layout the same formula runs in scalar code, whose exp is another one.
    torch.testing.assert_close(npu.npu_swiglu(x.T.contiguous(), 0).T, result, rtol=12 * UNIT, atol=0)
    assert torch.equal(npu.npu_swiglu(x.bfloat16()), npu.npu_swiglu(x.bfloat16().float()).bfloat16())
    with pytest.raises(ValueError, match="npu_swiglu: dim -1 of size 3 has no halves"):
        npu.npu_swiglu(floats(2, 3))
