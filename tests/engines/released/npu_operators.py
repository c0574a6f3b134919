"""torch_npu for a released engine on a CPU: its operators are our references, and every call is kept."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from stand_ins import StandIn
from torch import Tensor

from fxquant.lowering.ascend.operators import KERNELS
from fxquant.lowering.ascend.operators.arguments import _SCALAR_TYPES
from fxquant.lowering.ascend.operators.grouped_matmul import unpack_int4

_CODES = {dtype: code for code, dtype in _SCALAR_TYPES.items()}
_POSITIONAL = {
    "npu_quantize": ("x", "scales", "zero_points", "dtype", "axis", "div_mode"),
    "npu_quant_matmul": ("x1", "x2", "scale"),
    "npu_dynamic_quant": ("x",),
    "npu_swiglu": ("x", "dim"),
}


@dataclass(frozen=True)
class Call:
    """One call of an operator."""

    name: str
    given: dict[str, Any]
    result: Any


CALLS: list[Call] = []
"""All calls since it was last cleared."""


def install() -> None:
    """`torch_npu`, `torch.npu`, `Tensor.npu`, and the device type "npu"."""
    torch.utils.rename_privateuse1_backend("npu")
    device, module = StandIn("torch.npu"), StandIn("torch_npu")
    device.is_available = lambda: True  # type: ignore[attr-defined]
    device.current_device = lambda: "cpu"  # type: ignore[attr-defined]
    for name in ("npu_quantize", "npu_quant_matmul", "npu_dynamic_quant", "npu_swiglu", "npu_grouped_matmul"):
        setattr(module, name, _kept(name))
    module.npu_format_cast = lambda tensor, layout, *rest: tensor  # type: ignore[attr-defined]
    module.npu_format_cast_ = lambda tensor, layout, *rest: tensor  # type: ignore[attr-defined]
    module.npu_weight_quant_batchmatmul = weight_quant_batchmatmul  # type: ignore[attr-defined]
    module.npu = device  # type: ignore[attr-defined]
    sys.modules |= {"torch_npu": module, "torch_npu.npu": device, "torch.npu": device}
    torch.npu = device  # type: ignore[attr-defined]
    torch.Tensor.npu = lambda tensor, *args, **kwargs: tensor  # type: ignore[attr-defined]


def _kept(name: str) -> Any:
    """The reference, with torch.dtypes as the numbers that kernels get, kept in CALLS."""
    kernel = KERNELS[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(_POSITIONAL.get(name, ()), args, strict=False)) | kwargs
        numbers = {key: _CODES.get(value, value) if isinstance(value, torch.dtype) else value
                   for key, value in given.items()}  # fmt: skip
        if name == "npu_grouped_matmul":
            numbers = _grouped(numbers)
        result = kernel(**numbers)
        CALLS.append(Call(name, given, result))
        return result

    return call


def _grouped(given: dict[str, Any]) -> dict[str, Any]:
    """int64 scales of one group may lack its axis: [E, n] for [E, 1, n]."""
    scales = given.get("scale")
    if scales is not None and scales[0].dtype is torch.int64 and scales[0].dim() == 2:
        given = given | {"scale": [scales[0].unsqueeze(1)]}
    return given


def weight_quant_batchmatmul(
    x: Tensor, weight: Tensor, antiquant_scale: Tensor, antiquant_group_size: int = 0, **rest: Any
) -> Tensor:
    """`x @ (q * antiquant_scale)`, q int4 of int32 words [k, n / 8], antiquant_scale [G, n]: x stays float."""
    codes = unpack_int4(weight).float()
    groups = antiquant_scale.float().repeat_interleave(codes.shape[0] // antiquant_scale.shape[0], 0)
    result = (x.float() @ (codes * groups)).to(x.dtype)
    CALLS.append(Call("npu_weight_quant_batchmatmul", {"x": x, "weight": weight}, result))
    return result


def swiglu_quant(**given: Any) -> tuple[Tensor, Tensor]:
    """vllm-ascend's own operator grouped_matmul_swiglu_quant_v2, of the three that it fuses."""
    import torch_npu

    rows = torch_npu.npu_grouped_matmul(
        x=[given["x"]], weight=given["weight"], scale=given["weight_scale"], bias=given["weight_assist_matrix"],
        per_token_scale=[given["x_scale"]], group_list=given["group_list"], split_item=2, group_type=0,
        group_list_type=given["group_list_type"], output_dtype=torch.float32,
    )[0]  # fmt: skip
    return torch_npu.npu_dynamic_quant(torch_npu.npu_swiglu(rows))
