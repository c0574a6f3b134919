"""Multi-token prediction (MTP) layers: those that config.json announces, and those that the checkpoint has."""

import re

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.models.deepseek_v3 import mtp_paths

KEY = "num_nextn_predict_layers"
LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.")


def held_layers(checkpoint: Checkpoint, first: int) -> list[int]:
    """Layers from `first` on for which the checkpoint has tensors."""
    layers = {int(match[1]) for name in checkpoint.tensors if (match := LAYER.match(name))}
    return sorted(layer for layer in layers if layer >= first)


def why_no_mtp(checkpoint: Checkpoint, config: DeepseekV3Config, layers: tuple[str, ...]) -> tuple[str, str]:
    """Why the announced prediction layers are not `layers`, those of the checkpoint; and the remedy."""
    announced, held = config.num_nextn_predict_layers, held_layers(checkpoint, config.num_hidden_layers)
    paths = ", ".join(f"model.layers.{layer}" for layer in held[:3]) + (", …" if len(held) > 3 else "")
    if held and len(held) > announced:
        fact = f"config.json says {KEY}: {announced}, but the checkpoint holds tensors of {paths}."
        return (
            fact,
            f"If {'these are' if len(held) > 1 else 'this is'} the prediction layers, set {KEY} to {len(held)}.",
        )
    missing = [path for path in mtp_paths(config) if path not in layers]
    if missing:
        which = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        fact = f"config.json says {KEY}: {announced}, but the checkpoint has no tensor of {which}."
        return fact, f"Download the rest of the checkpoint, set {KEY} to {len(layers)}, or leave the option out."
    return "the checkpoint has no multi-token prediction layers.", "Leave the option out."
