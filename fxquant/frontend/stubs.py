"""Stubs of packages that exist only with an accelerator, so that a file that imports them can be imported."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ACCELERATOR_ONLY = (
    "kernel", "triton", "flash_attn", "deep_gemm", "fast_hadamard_transform", "tilelang", "torch_npu", "torchair",
)  # fmt: skip
"""`kernel` is the file of Triton kernels beside DeepSeek's inference code."""


class Stub(ModuleType):
    """Has every attribute, and can be called or used as a decorator; every result is another stub."""

    def __getattr__(self, name: str) -> "Stub":
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> "Stub":
        return Stub(f"{self.__name__}()")


class _Finder(MetaPathFinder, Loader):
    """Last in sys.meta_path, so that installed packages take precedence; serves files in `folder` only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.split(".")[0] not in ACCELERATOR_ONLY or self.folder not in _importer().parents:
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


def _importer() -> Path:
    """The file whose import statement is running; torch also looks for Triton, and must not find a stub."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename.startswith("<frozen") or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return Path(frame.f_code.co_filename).resolve()


@contextmanager
def accelerator_stubs(folder: Path) -> Iterator[None]:
    """Within this context, files in `folder` can import accelerator-only packages that are not installed."""
    finder = _Finder(folder.resolve())
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        # a stub left here would be found by imports from elsewhere, torch's search for Triton too
        for name in [name for name, module in sys.modules.items() if isinstance(module, Stub)]:
            del sys.modules[name]
