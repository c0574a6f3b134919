"""Published versions: the digests of forwards that were read in released model files, and which of them a class is."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MethodType
from typing import Any

from torch import nn

from fxquant.frontend.recognition.source_code import Code, code_of
from fxquant.tracing.undeclared import forward_owner

VERSIONS = "versions.json"
ONE_OF = {
    "attn_impl": ("naive", "absorb"),
    "gemm_impl": ("bf16", "fp8"),
    "block_size": (128,),
    "world_size": (1,),
    "rank": (0,),
}
"""Global names that published forwards read → values with which they compute the same in one process."""


@dataclass(frozen=True)
class Version:
    """A published forward.

    name        its class where it was published
    source      repository or package, with releases or commits
    digest      of its normalized source; statements: of each statement, see source_code.py
    nonnegative_bias  it computes what its adapter says where no correction bias is negative: its gate masks groups with
                0, and an expert of another group is chosen where fewer than top_k scores are above that
    """

    family: str
    name: str
    source: str
    digest: str
    statements: tuple[str, ...]
    nonnegative_bias: bool = False


@cache
def versions() -> tuple[Version, ...]:
    """All versions that are recognised, as the package lists them."""
    document = json.loads(files(__package__).joinpath(VERSIONS).read_text(encoding="utf-8"))
    return tuple(
        Version(
            family,
            entry["class"],
            "; ".join(entry["sources"]),
            entry["digest"],
            tuple(entry["statements"]),
            entry.get("nonnegative_bias", False),
        )  # fmt: skip
        for family, entries in document.items()
        for entry in entries
    )


def version_of(module: nn.Module, family: str) -> Version | None:
    """The published version that the forward of `module` is, whatever its class is called; None: it is none of them.

    A forward set on the instance, hooks and parametrizations are no part of any version.
    """
    held: Any = type(module)
    version = _version_of_class(held, forward_owner_of(held).forward, family)
    return version if version is not None and changed(module) is None else None


@cache  # a model of 671 billion parameters has 180,000 modules of a dozen classes
def _version_of_class(cls: Any, forward: Any, family: str) -> Version | None:
    code = _read(cls, forward)
    if code is None or any(value not in ONE_OF.get(name, ()) for name, value in code.constants.items()):
        return None
    return next((each for each in versions() if each.digest == code.digest and each.family == family), None)


def forget() -> None:
    """Ask `versions` again, also of classes that were looked up."""
    _version_of_class.cache_clear()


def nonnegative_bias(model: nn.Module) -> Version | None:
    """The published version among the modules of `model` that holds for correction biases of at least 0 alone."""
    families = {each.family for each in versions() if each.nonnegative_bias}
    found = (version_of(module, family) for family in sorted(families) for module in model.modules())
    return next((version for version in found if version is not None and version.nonnegative_bias), None)


def is_published(module: nn.Module) -> bool:
    """Whether it is a published version of any family."""
    return any(version_of(module, family) is not None for family in {each.family for each in versions()})


def changed(module: nn.Module) -> str | None:
    """What is attached to this instance and changes what its class computes."""
    if "forward" in vars(module):
        return "a forward set on the instance"
    if module._forward_hooks or module._forward_pre_hooks:
        return "a forward hook"
    if "parametrizations" in module._modules:
        return "a parametrization"
    caller = type(module).__call__
    if not (getattr(caller, "__module__", None) or "").startswith(("torch.", "transformers.")):
        return "a __call__ of its own"
    return None


def read(cls: type[nn.Module]) -> Code | None:
    """The code of the forward of `cls`."""
    held: Any = cls
    return _read(held, forward_owner_of(cls).forward)


def forward_owner_of(cls: type[nn.Module]) -> type[Any]:
    """As `forward_owner`, of a class."""
    return next(each for each in cls.__mro__ if "forward" in vars(each))


@cache
def _read(cls: Any, forward: Any) -> Code | None:
    return code_of(cls, forward.__func__ if isinstance(forward, MethodType) else forward)


def is_torch(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether `module` computes what torch's own `cls` does."""
    return forward_owner(module) is cls and changed(module) is None
