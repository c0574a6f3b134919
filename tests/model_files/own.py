"""The model of fxquant itself."""

from fxquant.models import DeepseekV3


def build_model(config):
    return DeepseekV3(config)
