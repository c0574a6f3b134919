"""Rotary keys of a config.json in both spellings, read as transformers 5 reads those of DeepSeek-V3.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters` with all of it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fxquant.checkpoint.rope_scaling import RopeScaling, yarn_mscale
from fxquant.inputs.validation import cut, shown

THETA, POSITIONS = 10000.0, 4096
"""transformers' defaults of `rope_theta` and `max_position_embeddings`."""
SPELLINGS = ("rope_scaling", "rope_parameters")
NULL_IS_ABSENT = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
TYPE_KEYS = ("rope_type", "type")
READ = {"rope_theta", *TYPE_KEYS}
READ_BY_YARN = READ | set(RopeScaling.model_fields)


@dataclass(frozen=True)
class RopeKeys:
    """What the keys say, not validated yet.

    spelling  the key whose mapping counts: transformers takes `rope_scaling` unless it is null or empty
    given     that mapping, or whatever stands there
    theta     `rope_theta` of the mapping, else that beside it, else 10000
    scaling   the fields of `RopeScaling`; None without scaling
    """

    spelling: str
    given: Any
    theta: Any
    scaling: Any

    @property
    def plain(self) -> bool:
        """Whether positions are not scaled."""
        return self.scaling is None

    def unread(self) -> Iterator[str]:
        """Keys of the mapping that change nothing here, as `rope_scaling.KEY`."""
        known = READ if self.plain else READ_BY_YARN
        for key in self.given if isinstance(self.given, dict) else ():
            if key not in known:
                yield f"{self.spelling}.{key}"

    def as_spelled(self, fact: str) -> str:
        """`fact` about the keys of transformers 4, with those that the file uses."""
        fact = re.sub(rf"\b{SPELLINGS[0]}(?=[.:])", self.spelling, fact)
        inside = isinstance(self.given, dict) and "rope_theta" in self.given
        return re.sub(r"(?<!\.)\brope_theta(?=:)", f"{self.spelling}.rope_theta", fact) if inside else fact


def rope_keys(config: dict[str, Any]) -> RopeKeys:
    """The rotary keys of `config`. Raises ValueError for YaRN's numbers without a type, which nothing would read, and
    for keys by kind of layer."""
    spelling = next((key for key in SPELLINGS if config.get(key) not in (None, {})), SPELLINGS[0])
    given = {} if config.get(spelling) is None else config[spelling]
    if not isinstance(given, dict):
        return RopeKeys(spelling, given, config.get("rope_theta", THETA), given)
    nested = next((key for key, value in given.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise ValueError(f"{spelling}.{cut(nested, 60)}: a mapping: all layers of DeepSeek-V3 have one rotation")
    theta = given.get("rope_theta", config.get("rope_theta", THETA))
    kind = next((given[key] for key in TYPE_KEYS if key in given), None)
    if kind is None and "factor" in given:
        raise ValueError(f"{spelling}.rope_type: missing beside factor, which is then not read: say yarn or default")
    if kind in (None, "default"):
        return RopeKeys(spelling, given, theta, None)
    return RopeKeys(spelling, given, theta, _scaling(config, given, kind))


def _scaling(config: dict[str, Any], given: dict[str, Any], kind: Any) -> dict[str, Any]:
    """The fields of `RopeScaling`: `original_max_position_embeddings` beside the mapping wins over the one in it, the
    default is the length of the model; a factor of null is the ratio of the two lengths."""
    scaling = {key: value for key, value in given.items() if value is not None or key not in NULL_IS_ABSENT}
    positions, original = config.get("max_position_embeddings", POSITIONS), "original_max_position_embeddings"
    scaling = {"type": kind, original: positions} | scaling | {"type": kind}
    if original in config:
        scaling[original] = config[original]
    lengths = positions, scaling[original]
    # with mscale_all_dim transformers needs the number itself
    if scaling.get("factor", 1) is None and not scaling.get("mscale_all_dim") and all(map(_is_length, lengths)):
        scaling["factor"] = positions / scaling[original]
    return scaling


def _is_length(value: Any) -> bool:
    return type(value) is int and value > 0


def other_readings(config: dict[str, Any], theta: float, scaling: RopeScaling | None) -> Iterator[str]:
    """Values that DeepSeek's own modeling code for transformers 4 takes from a valid `config` instead, as text."""
    given = rope_keys(config).given
    older = config.get("rope_theta", theta)
    if older != theta:
        yield f"rope_theta {shown(older)}, not {theta:g}"
    if scaling is None:
        return
    original = given.get("original_max_position_embeddings", POSITIONS)
    if original != scaling.original_max_position_embeddings:
        yield f"original_max_position_embeddings {shown(original)}, not {scaling.original_max_position_embeddings}"
    if not scaling.truncate:
        yield "truncate true, not false"
    mscales = 1.0 if scaling.mscale is None else scaling.mscale, scaling.mscale_all_dim or 0.0
    above, below = (yarn_mscale(scaling.factor, mscale) for mscale in mscales)
    if above / below != scaling.rotary_scale:
        yield f"cos and sin times {above / below:.6g}, not {scaling.rotary_scale:.6g}"
