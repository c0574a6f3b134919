"""Parametrized tests of which the default run takes a few cases, and `pytest -m slow` the rest."""

from collections.abc import Iterable
from typing import Any

import pytest

POLICIES = ("deepseek_w4a8", "deepseek_w4a8_per_channel_static", "deepseek_w8a8_mix", "float")
"""Shipped policies that between them have every scheme and both forms of int4."""


def others_slow(values: Iterable[Any], keep: Iterable[Any]) -> list[Any]:
    """`values`, those that are not in `keep` marked slow."""
    keep = list(keep)
    return [value if value in keep else _slow(value) for value in values]


def _slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
