"""Saved state: what a model's modules were before they were adapted, and how to restore it."""

from typing import Any

from torch import nn

TABLES = ("_modules", "_parameters", "_buffers")


class SavedState:
    """The state of each module before its first change."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[nn.Module, dict[str, Any], dict[str, dict]]] = {}

    def touch(self, module: nn.Module) -> None:
        """Save the state of `module`, unless it is saved already."""
        if id(module) not in self._before:
            # vars() alone would share these dicts, which adapting changes in place
            tables = {table: dict(vars(module)[table]) for table in TABLES}
            self._before[id(module)] = (module, dict(vars(module)), tables)

    def undo(self) -> None:
        """Restore every touched module."""
        for module, attributes, tables in self._before.values():
            vars(module).clear()
            vars(module).update(attributes)
            for table, content in tables.items():
                vars(module)[table].clear()
                vars(module)[table].update(content)
        self._before.clear()
