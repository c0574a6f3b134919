"""What the process of a model.py hands back."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Traced:
    """What comes back: the float program as text, where its checkpoint lies, and how the model came in."""

    program: str
    checkpoint: Path
    policy: str | None
    way_in: str
