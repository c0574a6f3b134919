"""Model of a found folder, from its config.json: the keys that it had before quantizers added those for engines."""

from typing import Any

from fxquant.errors import FxquantError
from fxquant.foreign.found import CONFIG, FoundFolder
from fxquant.frontend.source import Source, source_of_config

ADDED = ("quantization_config", "quantize", "mla_quantize", "moe_quantize", "mtp_quantize")
MODEL_TYPE = "deepseek_v3"
RENAMED = ("deepseekv2",)
"""model_type of the same model where an engine serves several generations under one name."""


def model_config(config: dict[str, Any]) -> dict[str, Any]:
    """`config` as it was before quantization."""
    kept = {key: value for key, value in config.items() if key not in ADDED}
    return kept | {"model_type": MODEL_TYPE} if config.get("model_type") in RENAMED else kept


def source_of_found(found: FoundFolder) -> Source:
    """The model that config.json of the folder describes, without weights."""
    if found.config is None:
        raise FxquantError(found.path, f"has no {CONFIG} to say what the model is.", "Pass --against MODEL.")
    return source_of_config(model_config(found.config), found.path / CONFIG)
