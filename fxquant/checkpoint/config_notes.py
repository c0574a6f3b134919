"""What to know of a config.json that is read: keys that nobody reads, and those that other code reads otherwise."""

from collections.abc import Iterator
from typing import Any

from fxquant.checkpoint.config import DeepseekV3Config, parse_config
from fxquant.checkpoint.config_keys import Sized, repeated, unread
from fxquant.checkpoint.model_dtype import DTYPE_KEYS
from fxquant.checkpoint.rope_keys import SPELLINGS, other_readings, rope_keys
from fxquant.inputs.validation import cut, shown

ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV3Model")
READ = (*DeepseekV3Config.model_fields, *SPELLINGS, "original_max_position_embeddings")


def config_notes(config: dict[str, Any]) -> list[str]:
    """A sentence each, for a `config` that `parse_config` takes; most have none."""
    parsed = parse_config(config, "config.json")
    notes = (*_of_keys(config, parsed), *_of_rotary(config, parsed))
    return [f"config.json: {note}" for note in notes]


def _of_keys(config: dict[str, Any], parsed: DeepseekV3Config) -> Iterator[str]:
    if unknown := unread(config, READ, rope_keys(config).unread()):
        yield f"keys that are not read and may change the model: {unknown}"
    architectures = config.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if others := ", ".join(name for name in names if name not in ARCHITECTURES):
        yield f"the graph is that of {ARCHITECTURES[0]}, whatever {cut(others, 80)} does"
    heads = Sized("num_key_value_heads", parsed.num_attention_heads, "not read, latent attention has one per head")
    yield from repeated(config, (heads,))
    dtypes = [config[key] for key in DTYPE_KEYS if config.get(key) is not None]
    if len(dtypes) > 1 and dtypes[0] != dtypes[1]:
        yield f"{DTYPE_KEYS[0]} {shown(dtypes[0])} counts, not {DTYPE_KEYS[1]} {shown(dtypes[1])}"


def _of_rotary(config: dict[str, Any], parsed: DeepseekV3Config) -> Iterator[str]:
    first, second = SPELLINGS
    if config.get(first) and config.get(second) and config[first] != config[second]:
        yield f"{first} counts, not {second}, as in transformers 5"
    if readings := "; ".join(other_readings(config, parsed.rope_theta, parsed.rope_scaling)):
        spelling = rope_keys(config).spelling
        yield f"{spelling} is read as transformers 5 does; DeepSeek's own code takes {readings}"
