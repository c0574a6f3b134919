"""Serving: what an engine's start command is made from. Each engine has the command in its own serving.py."""

import shlex
from dataclasses import dataclass

HERE = '"$PWD"'
"""The folder that a shell is in, as a word of its command."""


@dataclass(frozen=True)
class RankLayout:
    """How ranks share the model.

    tp  tensor-parallel ranks, which split every linear but whole experts
    ep  expert-parallel ranks, a multiple of `tp`: each has whole experts; 1: `tp` ranks split every expert
    """

    tp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        """All ranks."""
        return max(self.tp, self.ep)

    @property
    def replicas(self) -> int:
        """Data-parallel copies of everything but the experts."""
        return self.ranks // self.tp

    @property
    def options(self) -> str:
        """`--tp` and `--ep` as fxquant takes them."""
        return f"--tp {self.tp}" + (f" --ep {self.ep}" if self.ep > 1 else "")

    def __str__(self) -> str:
        return f"ranks: {self.tp}" + (f", expert-parallel: {self.ep}" if self.ep > 1 else "")


@dataclass(frozen=True)
class Serving:
    """One deployment.

    folder       the output, as the user named it; "": the folder that the shell is in
    layout       its ranks
    quantized    whether any linear is
    mixed        shared experts are of the scheme in which the engine runs them as routed ones
    float_draft  multi-token prediction layers are there, and all of them is float
    """

    folder: str = ""
    layout: RankLayout = RankLayout()
    quantized: bool = True
    mixed: bool = False
    float_draft: bool = False

    @property
    def quoted(self) -> str:
        """The folder as a word of a shell command."""
        return shlex.quote(self.folder) if self.folder else HERE
