"""Stand-ins for what a released SGLang imports and this machine lacks: packages, the device, its compiler.

They let its files be imported, and compute nothing: whatever the tests compare comes from its own code, from torch, or
from our operators (`sglang_operators.py`).
"""

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from typing import Any

import torch

NOT_OURS = ("sglang.srt.layers.attention.fla", "sglang.srt.model_executor.runner")
"""Parts of SGLang that start a compiler when they are imported; no weight passes through them."""


class _Kind(type):
    """Classes that have every attribute: another such class."""

    def __getattr__(cls, name: str) -> Any:
        if name == "__get_pydantic_core_schema__":
            from pydantic_core import core_schema

            return lambda *_: core_schema.any_schema()
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Kind(name, (Nothing,), {})
        setattr(cls, name, made)
        return made

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __getitem__ = __or__

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


class Nothing(metaclass=_Kind):
    """A class, decorator and object of a package that is not there."""

    def __new__(cls, *given: Any, **_: Any) -> Any:
        decorates = len(given) == 1 and callable(given[0]) and cls.__module__ == __name__
        return given[0] if decorates else object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __init_subclass__(cls, **_: Any) -> None: ...

    def __call__(self, *given: Any, **_: Any) -> Any:
        return given[0] if len(given) == 1 and callable(given[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class _Empty(types.ModuleType):
    __version__ = "99"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Kind(name, (Nothing,), {})
        setattr(self, name, made)
        return made


def empty_package(name: str) -> types.ModuleType:
    """A module that has everything and does nothing; importing `name` finds it."""
    return sys.modules.setdefault(name, _Empty(name))


class _Finder(MetaPathFinder, Loader):
    """Finds a module for each that SGLang's files import and that is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not any(name == left_out or name.startswith(f"{left_out}.") for left_out in NOT_OURS):
            top, _, inner = name.partition(".")
            if top in {"sglang", "torch", "transformers"} or top in sys.stdlib_module_names:
                return None
            if inner and not isinstance(sys.modules.get(name.rpartition(".")[0]), _Empty):
                return None
            if importlib.machinery.PathFinder.find_spec(name, path) or not (inner or _sglang_asks()):
                return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def _sglang_asks() -> bool:
    """Whether the importing file is one of SGLang: torch and transformers must not find what is not there."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return "sglang" in Path(frame.f_code.co_filename).parts


def stand_in() -> None:
    """For this process, before sglang is imported: an NPU is there, and packages that are missing are empty."""
    sys.meta_path.insert(0, _Finder())
    device: Any = types.ModuleType("torch.npu")
    device.is_available, device.device_count, device.current_device = (lambda: True), (lambda: 1), (lambda: 0)
    device.get_device_name, device.mem_get_info = (lambda *_: "Ascend910B"), (lambda *_: (1 << 35, 1 << 36))
    device.Stream, device.empty_cache = Nothing, lambda: None
    sys.modules["torch.npu"] = torch.npu = device  # type: ignore[attr-defined]
    torch.compile = lambda function=None, **_: function or (lambda inner: inner)  # type: ignore[assignment]
    dill: Any = empty_package("dill")
    dill.dumps = lambda *_, **__: b""
    _register_configs_again()
    _stay_on_cpu()


def _register_configs_again() -> None:
    """SGLang registers configurations that a newer transformers has by itself."""
    from transformers.models.auto import configuration_auto

    mapping = configuration_auto._LazyConfigMapping
    register = mapping.register
    mapping.register = lambda self, key, value, exist_ok=False: register(self, key, value, exist_ok=True)


def _stay_on_cpu() -> None:
    """`.npu()` and `.to(device="npu")` leave a tensor where it is."""
    to = torch.Tensor.to

    def to_here(self: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        if named.get("device") == "npu":
            named.pop("device")
        return to(self, *given, **named) if given or named else self

    torch.Tensor.to = to_here  # type: ignore[assignment, method-assign]
    torch.Tensor.npu = lambda self, *_, **__: self  # type: ignore[attr-defined]
