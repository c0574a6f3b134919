"""Smoothing rules of a policy: ordered; the first rule that matches a pair decides its method."""

import re
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fxquant.inputs.limits import NAME_LENGTH
from fxquant.inputs.validation import shown
from fxquant.policy.kinds import Kind

PATTERN = r"[\w.*?\[\]!\-]+"


def one_as_list(kind: Any) -> Any:
    """Allow a single kind without a list."""
    return [kind] if isinstance(kind, str) else kind


def checked_pattern(path: str | None) -> str | None:
    """`path`, if it is a valid shell pattern. Raises ValueError."""
    if path is not None and (len(path) > NAME_LENGTH or not re.fullmatch(PATTERN, path, re.ASCII)):
        raise ValueError(f"{shown(path)} is not a shell pattern of a module path")
    return path


class SmoothMethod(StrEnum):
    """How the scales of a pair are computed. With a the largest magnitude of an input channel, w that of its weights:

    NONE         no smoothing
    SMOOTHQUANT  `s = a**alpha / w**(1 - alpha)` (Xiao et al. 2022, arXiv:2211.10438)
    M4           the same, and norms are also shifted: `z = (max + min) / 2` (Wei et al. 2023, arXiv:2304.09145)
    FLEX         `s = a**alpha / w**beta`, alpha and beta minimize the error of the linears' outputs
    """

    NONE = "none"
    SMOOTHQUANT = "smoothquant"
    M4 = "m4"
    FLEX = "flex"


class PairKind(StrEnum):
    """The producer of the smoothed value: a norm, a linear through the attention, or up_proj through the swiglu."""

    NORM = "norm"
    LINEAR = "linear"
    SWIGLU = "swiglu"


class SmoothRule(BaseModel):
    """`kind` and `path` (a shell pattern on the module path) match linears that read the value, `pair` its producer;
    all given keys must match."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: tuple[Kind, ...] = ()
    path: str | None = None
    pair: PairKind | None = None
    method: SmoothMethod
    alpha: float = Field(default=0.5, ge=0, le=1, allow_inf_nan=False)
    optional: bool = False
    why: str = ""

    _accept_one_kind = field_validator("kind", mode="before")(one_as_list)
    _check_path = field_validator("path")(checked_pattern)

    @model_validator(mode="after")
    def _check(self) -> "SmoothRule":
        if "alpha" in self.model_fields_set and self.method in (SmoothMethod.NONE, SmoothMethod.FLEX):
            raise ValueError(f"alpha does not apply to method {self.method}")
        return self

    def selects(self, pair: PairKind, consumers: list[tuple[str, Kind]]) -> bool:
        """Whether the rule's patterns match a pair whose value the modules `consumers` read."""
        named = (
            (not self.kind or kind in self.kind) and (self.path is None or fnmatchcase(module, self.path))
            for module, kind in consumers
        )
        return (self.pair is None or self.pair is pair) and any(named)

    def __str__(self) -> str:
        where = [", ".join(self.kind)] if self.kind else []
        where += [self.path] if self.path is not None else []
        where += [f"after a {self.pair}"] if self.pair is not None else []
        alpha = f" alpha {self.alpha:g}" if self.method in (SmoothMethod.SMOOTHQUANT, SmoothMethod.M4) else ""
        return f"{' at '.join(where) or 'everything'} → {self.method}{alpha}"


NormBias = Literal["shifted", "every"]
"""Which norms have a bias in the output: the shifted ones, or every norm, as the reference tool writes it."""
