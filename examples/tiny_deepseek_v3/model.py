"""A small trained DeepSeek-V3: the file that `fxquant compile` takes."""

from torch import nn

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.models import DeepseekV3

CHECKPOINT = "."  # relative to this file: config.json, the FP8 weights, the tokenizer


def build_model(config: DeepseekV3Config) -> nn.Module:
    """Called on the meta device: no weight is allocated. Subclass a block here and every output follows."""
    return DeepseekV3(config)
