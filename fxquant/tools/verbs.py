"""How typer treats our commands: help without names of Python types, endings left to the boundary."""

from collections.abc import Iterable
from typing import Any, TypeVar

from typer.core import TyperCommand, TyperGroup

from fxquant.tools.boundary import Ended
from fxquant.tools.visible import visible

Parameter = TypeVar("Parameter")


class Verb(TyperCommand):
    """A command."""

    def get_params(self, ctx: Any) -> Any:
        """Of its help."""
        return _without_flag_types(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Runs it, with numpy: torch would import that from C, where an interrupt is dropped."""
        import numpy  # noqa: F401

        return super().invoke(ctx)


class Verbs(TyperGroup):
    """All of them."""

    def get_params(self, ctx: Any) -> Any:
        """Of the help of `fxquant` itself."""
        return _without_flag_types(super().get_params(ctx))

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Reads the command line up to the verb."""
        try:
            return super().make_context(*arguments, **options)
        except Exception as error:
            raise _visible_usage(error) from None

    def invoke(self, ctx: Any) -> Any:
        """Reads the rest of it, and runs the verb."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, BrokenPipeError) as error:
            raise Ended(error, ctx.invoked_subcommand or "") from error
        except Exception as error:
            raise _visible_usage(error) from error.__cause__


def _without_flag_types(parameters: Iterable[Parameter]) -> list[Parameter]:
    """`--force`, not `--force <bool>`."""
    listed = list(parameters)
    for one in listed:
        if getattr(one, "is_flag", False) and getattr(one, "metavar", None) is None:
            one.metavar = ""  # type: ignore[attr-defined]
    return listed


def _visible_usage(error: Exception) -> Exception:
    """What the user typed comes back in errors of usage, which typer prints itself."""
    if hasattr(error, "format_message"):
        for name, value in list(vars(error).items()):
            if isinstance(value, str):
                setattr(error, name, visible(value))
    return error
