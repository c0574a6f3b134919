"""MODEL, as a user names it, to a module on the meta device and its checkpoint."""

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fxquant.checkpoint import Checkpoint, open_checkpoint
from fxquant.config import parse_config
from fxquant.errors import FxquantError
from fxquant.models import DeepseekV3

CONTRACT = "A model.py defines build_model(config) and may name its CHECKPOINT folder; see docs/model-file.md."


@dataclass(frozen=True)
class Source:
    """A model without weights, the checkpoint that has them, and the policy its file names, if any."""

    path: Path
    model: DeepseekV3
    checkpoint: Checkpoint
    policy: str | None = None

    @property
    def name(self) -> str:
        """Short name for default output folders."""
        return self.checkpoint.folder.resolve().name


def open_source(path: Path, checkpoint: Path | None = None) -> Source:
    """Open a Hugging Face folder or a `model.py`. `checkpoint` overrides the folder that the file names.

    A folder runs no code. A `model.py` is imported and its `build_model` called on the meta device.
    """
    if path.is_dir():
        opened = open_checkpoint(path)
        return Source(path, _build(DeepseekV3, opened, path), opened)
    if path.suffix != ".py" or not path.is_file():
        fact = "no such file or folder." if not path.exists() else "neither a folder nor a .py file."
        raise FxquantError(path, fact, "Name a Hugging Face checkpoint folder or a model.py.")
    with _neighbours_importable(path):
        module = _import(path)
        opened = open_checkpoint(checkpoint or _checkpoint_folder(path, module))
        build = getattr(module, "build_model", None)
        if not callable(build):
            raise FxquantError(path, "defines no build_model.", CONTRACT)
        return Source(path, _build(build, opened, path), opened, _policy(path, module))


def _policy(path: Path, module: ModuleType) -> str | None:
    """The file's POLICY; a YAML file is relative to it, as CHECKPOINT is."""
    named = getattr(module, "POLICY", None)
    return str(path.parent / named) if isinstance(named, str) and named.endswith((".yaml", ".yml")) else named


@contextmanager
def _neighbours_importable(path: Path) -> Iterator[None]:
    """A model.py may import files that lie beside it."""
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fxquant_user_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module of their annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise FxquantError(path, f"cannot be imported: {_where(error, path)}", CONTRACT) from error
    return module


def _checkpoint_folder(path: Path, module: ModuleType) -> Path:
    named = getattr(module, "CHECKPOINT", None)
    if named is None:
        raise FxquantError(path, "names no CHECKPOINT.", "Set CHECKPOINT in the file or pass --checkpoint DIR.")
    folder = path.parent / str(named)
    if not folder.is_dir():
        raise FxquantError(path, f"CHECKPOINT {str(named)!r} is not a folder.", "It is relative to the file.")
    return folder


def _build(build: Any, checkpoint: Checkpoint, place: Path) -> DeepseekV3:
    config = parse_config(checkpoint.config, checkpoint.folder / "config.json")
    try:
        with torch.device("meta"):
            model = build(config)
    except FxquantError:
        raise
    except Exception as error:
        raise FxquantError(place, f"build_model failed: {_where(error, place)}", CONTRACT) from error
    if not isinstance(model, DeepseekV3):
        found = type(model).__name__
        raise FxquantError(place, f"build_model gave a {found}.", "Build fxquant.models.DeepseekV3 or a subclass.")
    return model


def _where(error: Exception, path: Path) -> str:
    """The error in one line, with the user's own line of code where there is one."""
    own = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == path.resolve()
    ]
    line = f" (line {own[-1].lineno}: {own[-1].line})" if own else ""
    return f"{type(error).__name__}: {error}{line}."
