"""typer command classes: help without names of Python types, and errors left to the boundary."""

from collections.abc import Iterable
from typing import Any, TypeVar

from typer.core import TyperCommand, TyperGroup

from fxquant.tools.boundary import Ended
from fxquant.tools.visible import visible

Parameter = TypeVar("Parameter")


class Verb(TyperCommand):
    """One verb."""

    def get_params(self, ctx: Any) -> Any:
        """Parameters, as its help shows them."""
        return _without_flag_types(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Import numpy, then run: torch would import numpy from C, where an interrupt is dropped."""
        import numpy  # noqa: F401

        return super().invoke(ctx)


class Verbs(TyperGroup):
    """The group of all verbs."""

    def get_params(self, ctx: Any) -> Any:
        """Parameters, as the help of `fxquant` itself shows them."""
        return _without_flag_types(super().get_params(ctx))

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Read the command line up to the verb."""
        try:
            return super().make_context(*arguments, **options)
        except Exception as error:
            raise _visible_usage(error) from None

    def invoke(self, ctx: Any) -> Any:
        """Read the rest of it, and run the verb."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, BrokenPipeError) as error:
            raise Ended(error, ctx.invoked_subcommand or "") from error
        except Exception as error:
            raise _visible_usage(error) from error.__cause__


def _without_flag_types(parameters: Iterable[Parameter]) -> list[Parameter]:
    """`--force`, not `--force <bool>`."""
    listed = list(parameters)
    for parameter in listed:
        if getattr(parameter, "is_flag", False) and getattr(parameter, "metavar", None) is None:
            parameter.metavar = ""  # type: ignore[attr-defined]
    return listed


def _visible_usage(error: Exception) -> Exception:
    """Escape what the user typed in usage errors, which typer prints itself."""
    if hasattr(error, "format_message"):
        for name, value in list(vars(error).items()):
            if isinstance(value, str):
                setattr(error, name, visible(value))
    return error
