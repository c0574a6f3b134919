"""Policy rule: the modules that it selects, and the scheme that it gives them."""

from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidatorFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)

from fxquant.policy.kinds import Kind
from fxquant.policy.smooth_rules import checked_pattern, one_as_list
from fxquant.schemes.schemes import Scheme, WeightAlgorithm

LEAVE_OUT: Literal["LEAVE_OUT"] = "LEAVE_OUT"
"""In place of a scheme: tensors of the selected modules are left out of the output."""
GROUP_SIZES = (0, 32, 64, 128, 256)
AUTO, AUTO_WORD = -1, "auto"
"""`group_size: auto` and its value: the size that the target takes, `fxquant.policy.group_sizes.choose`."""


class Rule(BaseModel):
    """`kind` and `path` (a shell pattern on the module path) select; both must hold when both are given.

    per_channel_algorithm  in place of `algorithm` where `group_size: auto` becomes 0
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: tuple[Kind, ...] = ()
    path: str | None = None
    scheme: Scheme | Literal["LEAVE_OUT"]
    group_size: int = 0
    algorithm: WeightAlgorithm = WeightAlgorithm.MIN_MAX
    per_channel_algorithm: WeightAlgorithm | None = None
    optional: bool = False
    why: str = ""

    _accept_one_kind = field_validator("kind", mode="before")(one_as_list)
    _check_path = field_validator("path")(checked_pattern)

    @field_validator("group_size", mode="wrap")
    @classmethod
    def _check_group_size(cls, given: Any, as_number: ValidatorFunctionWrapHandler) -> int:
        if given == AUTO_WORD:
            return AUTO
        size: int = as_number(given)
        if size not in GROUP_SIZES:
            raise ValueError(f"{size} is not one of {', '.join(map(str, GROUP_SIZES))} or {AUTO_WORD}")
        return size

    @field_serializer("group_size", when_used="json")
    def _say_group_size(self, size: int) -> int | str:
        return AUTO_WORD if size == AUTO else size

    @model_validator(mode="after")
    def _check(self) -> "Rule":
        if not self.kind and self.path is None:
            raise ValueError("a rule needs a kind or a path")
        if self.group_size and not self.grouped:
            named = " or ".join(scheme for scheme in Scheme if scheme.grouped)
            raise ValueError(f"group_size is for {named}, not for {self.scheme}")
        if self.algorithm is not WeightAlgorithm.MIN_MAX and not self.quantizes:
            raise ValueError(f"algorithm {self.algorithm} needs an integer scheme, and {self.scheme} is not one")
        if self.per_channel_algorithm is not None and self.group_size != AUTO:
            raise ValueError(f"per_channel_algorithm is for group_size: {AUTO_WORD}")
        if self.algorithm is not WeightAlgorithm.MIN_MAX and Kind.MTP in self.kind:
            raise ValueError(f"algorithm {self.algorithm}: mtp layers support only {WeightAlgorithm.MIN_MAX}")
        return self

    @property
    def quantizes(self) -> bool:
        """Whether it quantizes weights to integers."""
        return isinstance(self.scheme, Scheme) and self.scheme.weight_bits is not None

    @property
    def static(self) -> bool:
        """Whether its scheme needs calibrated ranges of inputs."""
        return isinstance(self.scheme, Scheme) and self.scheme.static

    @property
    def grouped(self) -> bool:
        """Whether its scheme supports groups with second scales."""
        return isinstance(self.scheme, Scheme) and self.scheme.grouped

    def sized(self, size: int) -> "Rule":
        """This rule with `size` in place of `auto`."""
        if self.group_size != AUTO:
            return self
        algorithm = self.algorithm if size or self.per_channel_algorithm is None else self.per_channel_algorithm
        update = {"group_size": size, "algorithm": algorithm, "per_channel_algorithm": None}
        return self.model_copy(update=update)

    def selects(self, module: str, kind: Kind) -> bool:
        """Whether the rule's patterns match a module, regardless of earlier rules."""
        return (not self.kind or kind in self.kind) and (self.path is None or fnmatchcase(module, self.path))

    def __str__(self) -> str:
        where = [", ".join(self.kind)] if self.kind else []
        where += [self.path] if self.path is not None else []
        size = f" group_size {AUTO_WORD if self.group_size == AUTO else self.group_size}" if self.group_size else ""
        by = f" by {self.algorithm}" if self.algorithm is not WeightAlgorithm.MIN_MAX else ""
        return f"{' at '.join(where)} → {self.scheme}{size}{by}"
