"""User module: imports a model.py as a module of a package, its folder, so that it can import files beside it."""

import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from fxquant.errors import FxquantError
from fxquant.frontend.stubs import accelerator_stubs

CONTRACT = "A model.py defines build_model(config) and may name its CHECKPOINT folder; see docs/model-file.md."
CUDA = "The file runs on the meta device, without an accelerator: it must not choose a device."
WEIGHTS = (
    "Build the model from the config that build_model is given, as DeepseekV3ForCausalLM(DeepseekV3Config(…)): weights "
    "are read from the checkpoint, tensor by tensor, and none may be loaded here."
)
RELEASE = (
    "The file was written for another release of transformers. Remote code of checkpoint folders runs with 4.51 to "
    "4.57: pip install 'transformers<5'. Or compile the checkpoint folder itself: none of its code runs."
)


@contextmanager
def importable(path: Path) -> Iterator[None]:
    """Within this context `path` and what it imports from its folder are modules."""
    folder, package = str(path.parent.resolve()), _package(path)
    sys.path.insert(0, folder)
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = [folder]
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]


def import_file(path: Path) -> ModuleType:
    """Run the file at `path`, which must be importable. Raises FxquantError with its line if it fails."""
    spec = importlib.util.spec_from_file_location(module_name(path), path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module of their annotations here
    try:
        with accelerator_stubs(path.parent):
            spec.loader.exec_module(module)
    except FxquantError:
        raise
    except Exception as error:
        raise FxquantError(path, f"cannot be imported: {where(error, path)}", remedy(error)) from error
    return module


def module_name(path: Path) -> str:
    """Of the module that the file at `path` becomes."""
    return f"{_package(path)}.{_plain(path)}"


def _package(path: Path) -> str:
    return f"fxquant_user_{_plain(path)}"


def _plain(path: Path) -> str:
    return re.sub(r"\W", "_", path.stem)


def where(error: BaseException, path: Path) -> str:
    """The error in one line, with the user's own line of code where there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    line = f" (line {own[-1].lineno}: {own[-1].line})" if own else ""
    message = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {message}{line}."


def remedy(error: BaseException) -> str:
    """What to do about an error in the user's file."""
    if any("from_pretrained" in frame.name for frame in traceback.extract_tb(error.__traceback__)):
        return WEIGHTS
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] == "transformers":
        return RELEASE
    cuda = "CUDA" in str(error) or "NVIDIA" in str(error)
    return CUDA if cuda else CONTRACT
