"""Traced model: what the child process of a model.py returns."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Traced:
    """The float program as text, its checkpoint folder, the file's policy, and the kind of model."""

    program: str
    checkpoint: Path
    policy: str | None
    input_kind: str
