"""torch.ops.npu on CPU: registration, dtypes and arguments of every operator."""

import re

import pytest
import torch
from ascend_calls import floats, int8, npu

from fxquant.lowering.ascend.operators import KERNELS, register
from fxquant.lowering.ascend.operators.arguments import dtype_of
from fxquant.lowering.ascend.operators.schemas import SCHEMAS


def test_every_operator_has_its_pinned_schema():
    for name in KERNELS:
        defined, pinned = getattr(npu, name).default._schema, torch._C.parse_schema("npu::" + SCHEMAS[name])
        assert defined == pinned


def test_every_schema_is_under_its_name():
    assert all(torch._C.parse_schema(schema).name == name for name, schema in SCHEMAS.items())


def test_register_twice_defines_once():
    before = npu.npu_swiglu.default
    register()
    assert npu.npu_swiglu.default is before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_pass_through_integer_parameters(dtype: torch.dtype):
    x, weight = int8(2, 3), int8(3, 4)
    assert npu.npu_quant_matmul(x, weight, torch.ones(4), output_dtype=dtype).dtype == dtype


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match=re.escape("npu_x: dtype is torch.int8; the CPU reference takes torch.qint8")):
        dtype_of(1, "npu_x: dtype", (torch.qint8,))
    with pytest.raises(ValueError, match=re.escape("npu_x: dtype is 999")):
        dtype_of(999, "npu_x: dtype", (torch.qint8,))


def test_arguments_that_no_kernel_takes_are_errors_unless_default():
    x = floats(2, 4)
    npu.npu_dynamic_quant(x, group_index=None, dst_type_max=0.0)
    with pytest.raises(ValueError, match="npu_dynamic_quant: group_index is not supported"):
        npu.npu_dynamic_quant(x, group_index=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="npu_moe_token_unpermute: padded_mode is not supported"):
        npu.npu_moe_token_unpermute(x, torch.arange(2), None, True)
    with pytest.raises(ValueError, match="npu_moe_token_unpermute: restore_shape is not supported"):
        npu.npu_moe_token_unpermute(x, torch.arange(2), restore_shape=[2, 4])
