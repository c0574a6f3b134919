"""Linear forms: the calls that take the place of a quantized linear, as data."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """One call. Its arguments are, by the names of its schema:

    what an earlier step gave under that name; `x`, the linear's input; `counts`, of rows sorted by expert; or the
    recipe's tensor with that suffix. An optional one that is none of these is left out.

    gives  names under which later steps take its results
    names  what is put behind the linear's name for the call, then for each of several results. A step that takes no
           tensor of the linear is made once for all linears of its input, and named after that
    """

    operator: Any
    gives: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of its schema."""
        return tuple(argument.name for argument in self.operator._schema.arguments)


Form = tuple[Step, ...]
"""Steps in order; the last one gives the linear's result."""
