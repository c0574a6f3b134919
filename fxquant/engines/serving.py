"""Serving: what the words that start an engine are made from. Each engine has them in a serving.py of its own."""

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Serving:
    """folder: the output, as the user named it."""

    folder: str

    @property
    def quoted(self) -> str:
        """The folder as a word of a shell command."""
        return shlex.quote(self.folder)
