"""Model definition: our DeepSeek-V3 in the `fxq::` dialect, to trace as it is or to subclass."""

from fxquant.models.deepseek_v3 import MLA, MLP, DecoderLayer, DeepseekV3, MoE
from fxquant.models.layers import Linear, RMSNorm

__all__ = ["MLA", "MLP", "DecoderLayer", "DeepseekV3", "Linear", "MoE", "RMSNorm"]
