"""Model families that need no adapters from the user: one file each, mostly data."""

from torch import nn

from fxquant.frontend.families import deepseek, remote_code, transformers_v4, transformers_v5, transformers_v5_0
from fxquant.frontend.families.base import Family

FAMILIES = (
    remote_code.FAMILY, transformers_v5.FAMILY, transformers_v5_0.FAMILY, transformers_v4.FAMILY, deepseek.FAMILY,
)  # fmt: skip


def family_of(model: nn.Module) -> Family | None:
    """The family whose root class and parts `model` has; None for one that needs no adapting at its root."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((each for each in FAMILIES if (not each.root or each.root in names) and each.recognises(model)), None)


__all__ = ["FAMILIES", "Family", "family_of"]
