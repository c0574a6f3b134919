"""config.json of a found folder: the model's own keys, without those that quantizers add for engines."""

from typing import Any

ADDED = ("quantization_config", "quantize", "mla_quantize", "moe_quantize", "mtp_quantize")
MODEL_TYPE = "deepseek_v3"
RENAMED = ("deepseekv2",)
"""model_type of the same model where an engine serves several generations under one name."""


def model_config(config: dict[str, Any]) -> dict[str, Any]:
    """`config` as it was before quantization."""
    kept = {key: value for key, value in config.items() if key not in ADDED}
    return kept | {"model_type": MODEL_TYPE} if config.get("model_type") in RENAMED else kept
