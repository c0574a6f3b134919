"""transformers' own model, of whichever version is installed."""

import transformers


def build_model(config):
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config.model_dump()))
