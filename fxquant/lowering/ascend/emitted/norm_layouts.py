"""Norm layouts: parameters of npu_add_rms_norm_quant as devices take them; the emitter copies these into its module.

One value per feature of the norm's weight [n]. Dtypes depend on that of x (op-plugin documentation): float16 with
float32 scales and int32 offsets, bfloat16 with both in bfloat16. All in float32 is for comparisons on CPU.
"""

import torch
from torch import Tensor


def norm_scale(dtype: torch.dtype, scale: Tensor, weight: Tensor) -> Tensor:
    """[1] -> [n]. bfloat16 is exact for the scales of a bfloat16 model, and rounds the scale of a float32 model."""
    return scale.to(torch.float32 if dtype is torch.float16 else dtype).expand(weight.shape).contiguous()


def norm_offset(dtype: torch.dtype, offset: Tensor, weight: Tensor) -> Tensor:
    """[1] -> [n]; a whole number from -128 to 127, exact in every dtype."""
    return offset.to(torch.int32 if dtype is torch.float16 else dtype).expand(weight.shape).contiguous()
