"""How to serve an output with MindIE."""

from fxquant.engines.serving import Serving


def serve(serving: Serving) -> str:
    """Keys of the server's config.json."""
    model = f"modelName deepseekv2, modelWeightPath {serving.quoted}, worldSize 8"
    mix = "models.deepseekv2.mix_shared_routing true if shared experts are W4A8_DYNAMIC, else false"
    return f"MindIE's config.json: {model}; {mix}"
