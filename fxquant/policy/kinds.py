"""Module kinds, the first thing that a policy rule matches on."""

from enum import StrEnum


class Kind(StrEnum):
    """A module declares its kind in a class or instance attribute `kind`; parameters inherit the nearest one."""

    EMBEDDING = "embedding"
    NORM = "norm"
    ATTENTION = "attention"
    DENSE_MLP = "dense_mlp"
    SHARED_EXPERT = "shared_expert"
    ROUTED_EXPERT = "routed_expert"
    GATE = "gate"
    HEAD = "head"
    MTP = "mtp"
    OTHER = "other"
