"""Shell completion of option values. Nothing here imports torch: it would take a second per keystroke."""

from collections.abc import Callable
from importlib import resources

from fxquant.engines.table import Target


def policies(incomplete: str) -> list[str]:
    """Shipped policies; none for the beginning of a path, which shells complete themselves."""
    folder = resources.files("fxquant.policy") / "shipped"
    names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    return [name for name in names if name.startswith(incomplete)]


def targets(incomplete: str) -> list[str]:
    """All targets."""
    return [target.value for target in Target if target.value.startswith(incomplete)]


def one_of(*words: str) -> Callable[[str], list[str]]:
    """Completion of an option that takes one of `words`."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete
