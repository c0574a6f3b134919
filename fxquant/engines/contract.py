"""Engine contract: what an engine loads and runs, as data, in the contract.yaml of its package."""

from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, field_validator

from fxquant.engines.table import Target
from fxquant.policy.kinds import Kind
from fxquant.schemes.schemes import Recipe, Scheme

FORMAT = 1
Dtype = Literal["bfloat16", "float16", "float32"]
ANY: Literal["any"] = "any"
"""In place of a list of schemes: all of them."""


class Verdict(StrEnum):
    """`unverified`: shown neither to work nor to fail; it is compiled, and the report says so."""

    ACCEPTED = "accepted"
    UNVERIFIED = "unverified"
    REFUSED = "refused"


class Evidence(StrEnum):
    """How a verdict is known, the strongest first; the reference says where.

    RUN         the engine's own code loaded such bytes, and what it then held was compared
    READ        a line of its source says so, nobody ran it
    DOCUMENTED  a document says so
    ASSUMED     nothing says so: like engines do it
    """

    RUN = "run"
    READ = "read"
    DOCUMENTED = "documented"
    ASSUMED = "assumed"


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cell(_Data):
    """A verdict on linears of some kinds under some schemes. The first matching cell of a contract decides.

    scheme      "any" for all
    module      shell pattern of the last part of the module's path
    group_size  for schemes with groups: the group sizes it applies to; None: all
    bias        whether it applies to linears with or without a bias; None: to both
    dtype       the dtypes of models it applies to; None: all
    """

    kind: tuple[Kind, ...]
    scheme: tuple[Scheme, ...] | Literal["any"]
    verdict: Verdict
    evidence: Evidence
    reference: str
    module: str = "*"
    group_size: tuple[int, ...] | None = None
    bias: bool | None = None
    dtype: tuple[Dtype, ...] | None = None
    why: str = ""
    way_out: str = ""

    @field_validator("kind", "scheme", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) and value != ANY else value

    def matches(self, kind: Kind, recipe: Recipe) -> bool:
        """Whether the verdict applies to such a linear."""
        if kind not in self.kind or not (self.scheme == ANY or recipe.scheme in self.scheme):
            return False
        sized = self.group_size is None or recipe.group_size in self.group_size
        named = fnmatchcase(recipe.module.rpartition(".")[2], self.module) and self.bias in (None, recipe.bias)
        typed = self.dtype is None or str(recipe.dtype).removeprefix("torch.") in self.dtype
        return sized and named and typed


class Multiples(_Data):
    """Sizes that a kernel takes, for the whole linear and for each rank's part of it."""

    kind: tuple[Kind, ...]
    scheme: tuple[Scheme, ...]
    in_features: int = 1
    out_features: int = 1
    largest_in_features: int | None = None
    reference: str


class Dtypes(_Data):
    """Dtypes of models that the engine takes, and the verdict on others."""

    accepted: tuple[Dtype, ...]
    others: Verdict
    reference: str


class TensorParallel(_Data):
    """How the engine splits linears over ranks.

    sizes          ranks that the format allows
    whole_groups   in_features per rank must be a multiple of the group size
    experts_whole  which experts are right on one rank or with expert parallelism only: those of two levels, or of int4
    heads          where the engine asks for whole heads on every rank; "": at `reference`
    """

    sizes: tuple[int, ...]
    whole_groups: bool
    experts_whole: Literal["none", "grouped", "int4"] = "none"
    why: str
    reference: str
    heads: str = ""


class Fused(_Data):
    """Linears with the same parent that an engine loads as one: their shards must have one scheme, and static ones
    one input scale and offset."""

    name: str
    members: tuple[str, ...]
    kind: tuple[Kind, ...] = tuple(Kind)
    reference: str


class Release(_Data):
    """Releases of an engine by number, `first` to `last` (empty: the newest, or unknown), and what they load.

    but  what of that they do not load after all, in words; the contract, which is of all releases, accepts it
    """

    engine: str
    first: str
    last: str = ""
    loads: str
    but: str = ""
    evidence: Evidence
    reference: str

    @property
    def span(self) -> str:
        """Its numbers in words."""
        if not self.first:
            return f"up to {self.last}" if self.last else "of unknown number"
        if not self.last:
            return f"{self.first} and later"
        return self.first if self.first == self.last else f"{self.first} to {self.last}"


class Section(_Data):
    """Modules that the engine reads as one type, which `key` of config.json gives.

    alike         schemes that it reads as one
    float_beside  float ones may stand beside quantized ones
    """

    key: str
    kind: tuple[Kind, ...]
    alike: tuple[Scheme, ...] = ()
    float_beside: bool = True
    evidence: Evidence
    reference: str


class SharedExpertMix(_Data):
    """The feature that runs shared experts as one more routed expert, and its switch."""

    switch: str
    needs: Scheme
    reference: str


class Contract(_Data):
    """The whole file. `header`: keys that its description file must have."""

    contract: Literal[1]
    target: Target
    title: str
    cells: tuple[Cell, ...]
    dtypes: Dtypes
    multiples: tuple[Multiples, ...] = ()
    tensor_parallel: TensorParallel
    fused: tuple[Fused, ...] = ()
    sections: tuple[Section, ...] = ()
    header: tuple[str, ...]
    releases: tuple[Release, ...]
    shared_expert_mix: SharedExpertMix | None = None

    def cell(self, kind: Kind, recipe: Recipe) -> Cell:
        """The verdict on a linear; what the contract does not mention is refused."""
        matching = next((cell for cell in self.cells if cell.matches(kind, recipe)), None)
        return matching or _unknown(kind, recipe.scheme)


def _unknown(kind: Kind, scheme: Scheme) -> Cell:
    why = f"the engine has no {scheme} for {kind}"
    return Cell(
        kind=(kind,),
        scheme=(scheme,),
        verdict=Verdict.REFUSED,
        evidence=Evidence.ASSUMED,
        reference="not in its contract",
        why=why,
    )


@cache
def load_contract(target: Target) -> Contract:
    """The contract of a target."""
    file = resources.files("fxquant.engines") / target.package / "contract.yaml"
    return Contract.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
