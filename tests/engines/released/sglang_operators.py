"""`torch.ops.npu` for a released SGLang: our reference operators, which note what its linears and experts hand them."""

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.lowering.ascend.operators import register
from fxquant.ops import int_matmul


@dataclass(frozen=True)
class Product:
    """One call of a quantized matmul. experts: rows per expert, None outside of routed experts."""

    x8: Tensor
    x_scale: Tensor | None
    counts: Tensor | None
    result: Tensor


class NpuOperators(types.ModuleType):
    """Everything that our operators have, and `products`, the matmuls since they were last taken."""

    def __init__(self) -> None:
        super().__init__("torch.ops.npu")
        register()
        self.reference = torch.ops.npu
        self.products: list[Product] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reference, name)

    def taken(self) -> list[Product]:
        """The products so far, which are forgotten."""
        taken, self.products = self.products, []
        return taken

    def npu_quant_matmul(
        self, x8: Tensor, weight: Tensor, scale: Tensor, *, pertoken_scale: Tensor | None = None, **named: Any
    ) -> Tensor:
        result = self.reference.npu_quant_matmul(x8, weight, scale, pertoken_scale=pertoken_scale, **named)
        self.products.append(Product(x8, pertoken_scale, None, result))
        return result

    def npu_grouped_matmul(
        self, *, x: Sequence[Tensor], weight: Sequence[Tensor], group_list: Tensor, scale: Any = None, **named: Any
    ) -> list[Tensor]:
        """Without a scale, int8 codes give their int32 sums, which our operator does not offer."""
        if scale is None and weight[0].dtype is torch.int8:
            result = [_sums(x[0], weight[0], group_list)]
        else:
            result = self.reference.npu_grouped_matmul(x=x, weight=weight, group_list=group_list, scale=scale, **named)
        x_scale = named["per_token_scale"][0] if named.get("per_token_scale") else None
        self.products.append(Product(x[0], x_scale, group_list, result[0]))
        return result

    def npu_dequant_swiglu_quant(
        self, *, x: Tensor, weight_scale: Tensor, activation_scale: Tensor, group_index: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """For int32 sums of experts, which our operator does not take."""
        wide = weight_scale.float().repeat_interleave(group_index, 0)
        return swiglu_quant(x.float() * wide * activation_scale.unsqueeze(-1))

    def npu_dynamic_quant(self, x: Tensor, dst_type: Any = None) -> tuple[Tensor, Tensor]:
        """int8 is what our operator makes by default."""
        assert dst_type in {None, torch.int8}
        return self.reference.npu_dynamic_quant(x)


def swiglu_quant(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """What sgl_kernel_npu fuses."""
    return torch.ops.npu.npu_dynamic_quant(torch.ops.npu.npu_swiglu(x))


def _sums(x8: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    blocks = x8.split(counts.tolist())
    return torch.cat([int_matmul(block, codes.T) for block, codes in zip(blocks, weight, strict=True)])


def stand_in_operators() -> NpuOperators:
    """For this process, `torch.ops.npu`."""
    operators = NpuOperators()
    torch.ops.npu = operators  # type: ignore[attr-defined]
    return operators
