"""Rotary position frequencies, plain and YaRN (Peng et al. 2023, arXiv:2309.00071, section 3)."""

import math

import torch
from torch import Tensor

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.checkpoint.rope_scaling import RopeScaling


def frequencies(config: DeepseekV3Config) -> list[float]:
    """`theta ** (-2i / width)` for i < width/2 in float32, interpolated per frequency if the config has YaRN."""
    width = config.qk_rope_head_dim
    # device: the model is built on meta, where nothing has a value
    powers = config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    inv_freq = 1.0 / powers
    if config.rope_scaling:
        keep = 1 - _ramp(config.rope_scaling, config.rope_theta, width)
        inv_freq = inv_freq / config.rope_scaling.factor * (1 - keep) + inv_freq * keep
    return [float(value) for value in inv_freq.tolist()]


def attention_factor(config: DeepseekV3Config) -> float:
    """Factor of cos and sin, 1 without YaRN."""
    return config.rope_scaling.rotary_scale if config.rope_scaling else 1.0


def _ramp(scaling: RopeScaling, theta: float, width: int) -> Tensor:
    """float32 [width / 2]: 0 where a frequency turns more than beta_fast times in the original context, 1 below
    beta_slow, linear between."""

    def dimension(turns: float) -> float:
        return (
            width * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    # 0.001 as in DeepSeek's code, against a division by zero
    steps = torch.arange(width // 2, dtype=torch.float32, device="cpu")
    return ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)
