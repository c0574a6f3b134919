"""Stand-ins for modules that a released engine imports and its loading of weights does not use."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


class _AnyClass(type):
    """Class of stand-in classes: they can be subscripted, iterated, and have any attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{cls.__name__}.{name}")

    def __getitem__(cls, item: Any) -> type:
        return cls

    def __iter__(cls) -> Any:
        return iter(())


class _AnyObject(metaclass=_AnyClass):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes anything."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Takes anything."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return {"type": "any"}


class StandIn(ModuleType):
    """Module whose names are made when they are asked for: a class for `LikeThis`, a mock for `like_this`."""

    __path__: Any = []
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        child = f"{self.__name__}.{name}"
        if child in sys.modules:
            return sys.modules[child]
        classlike = name[:1].isupper() and not name.isupper()
        value = _AnyClass(name, (_AnyObject,), {"__module__": self.__name__}) if classlike else MagicMock(name=child)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        parts = fullname.split(".")
        if any(".".join(parts[:length]) in self._names for length in range(1, len(parts) + 1)):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def stand_in_for(names: Iterable[str]) -> None:
    """From now on these modules, and all below them, are stand-ins in this process, installed or not."""
    sys.meta_path.insert(0, _Finder(names))
