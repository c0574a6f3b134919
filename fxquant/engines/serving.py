"""Serving: what an engine's start command is made from. Each engine has the command in its own serving.py."""

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
