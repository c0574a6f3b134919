"""Edited class: the error for a class that is like a published one, is none, and can't run its own forward."""

import inspect
from typing import Any

from torch import nn

from fxquant.errors import FxquantError
from fxquant.frontend.families.base import Family
from fxquant.frontend.recognition.difference import difference, kin
from fxquant.frontend.recognition.published import Version
from fxquant.frontend.recognition.source_code import unwrapped
from fxquant.tracing.undeclared import forward_owner, skeleton

MISSING = object()


def own_code(module: nn.Module) -> bool:
    """Whether the forward of `module` is neither torch's nor this package's."""
    package = (forward_owner(module).__module__ or "").split(".")[0]
    return package not in ("torch", "fxquant")


def edited(
    module: nn.Module, family: Family, reason: str, made_of: Version | None = None, differs: str = ""
) -> FxquantError:
    """Where the class is, why it can't run as it is, what differs from the published class, an adapter to paste."""
    name, published = type(module).__name__, made_of or kin(module, family.versions)
    fact = f"{name} is not a published class: {reason}."
    if published is not None:
        fact = f"{name} is not the {published.name} of {published.source.split(';')[-1].strip()}: {reason}."
        fact += f"\n\n{differs or _attribute(module, family, published) or difference(module, published)}"
    way_out = "Write the change as a subclass of fxquant.models, whose forward is traced as it is, or, if the class "
    return FxquantError(
        _place(module), fact, f"{way_out}computes what a part of DeepSeek-V3 does, declare it:\n\n{skeleton(module)}"
    )


def _attribute(module: nn.Module, family: Family, published: Version) -> str:
    """The attribute with which published code computes something else, "" if none does."""
    for path, wanted in family.requires.get(published.name, {}).items():
        if not is_as_required(module, path, wanted):
            return f"    its {path} is {value_at(module, path)}"
    return ""


def is_as_required(module: nn.Module, path: str, wanted: Any) -> bool:
    """Whether the attribute at dotted `path` is as a family requires, or not there."""
    value = value_at(module, path)
    return value is MISSING or bool(wanted(value) if callable(wanted) else value == wanted)


def value_at(module: nn.Module, path: str) -> Any:
    """The attribute at dotted `path`, MISSING if there is none."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, MISSING)
    return value


def _place(module: nn.Module) -> str:
    owner = forward_owner(module)
    try:
        code = unwrapped(owner.forward).__code__
        return f"{inspect.getsourcefile(code)}:{inspect.getsourcelines(code)[1]}"
    except (OSError, TypeError, AttributeError):
        return owner.__name__
