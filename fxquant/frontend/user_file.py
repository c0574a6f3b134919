"""Model file: imports a `model.py` and checks what it defines against the contract of docs/model-file.md."""

import ast
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.frontend.adaptation import Leaves
from fxquant.frontend.deepseek_args import hf_to_model_args
from fxquant.frontend.user_module import CONTRACT, import_file, importable, module_name

REMOTE_ROOT = "DeepseekV3ForCausalLM"
"""The model of a modeling_deepseek.py, as checkpoint folders have it; its `config_class` takes their config."""


@dataclass(frozen=True)
class UserFile:
    """What a model.py defines.

    build             (config) → the model, on the device of the caller's `torch.device` context
    takes_config      whether build_model takes a config, so that its sizes can be chosen
    leaves            module class → adapter
    checkpoint_names  path of a parameter in the model → its name in the checkpoint
    example_inputs    (model, phase) → (args, kwargs) to trace with; dynamic_shapes: (phase) → their dynamic sizes
    """

    path: Path
    build: Callable[[DeepseekV3Config], nn.Module]
    takes_config: bool
    checkpoint: str | None
    policy: str | None
    leaves: Leaves
    checkpoint_names: Callable[[str], str] | None
    example_inputs: Callable[..., Any] | None
    dynamic_shapes: Callable[..., Any] | None


@contextmanager
def open_user_file(path: Path) -> Iterator[UserFile]:
    """Import `path`. Within the context it can import files beside it.

    Raises FxquantError for a file that cannot be imported or does not meet the contract.
    """
    with importable(path):
        yield _read(path)


def _read(path: Path) -> UserFile:
    bare = "build_model" not in _top_names(path) and "model" in _top_names(path)
    with torch.device("meta") if bare else nullcontext():  # a model built on import takes no memory there
        module = import_file(path)
    build, takes_config = _builder(path, module)
    policy, names = getattr(module, "POLICY", None), getattr(module, "checkpoint_names", None)
    if isinstance(policy, str) and policy.endswith((".yaml", ".yml")):
        policy = str(path.parent / policy)
    return UserFile(
        path, build, takes_config, _text(path, module, "CHECKPOINT"), policy, _leaves(path, module),
        names.__getitem__ if isinstance(names, dict) else names,
        getattr(module, "example_inputs", None), getattr(module, "dynamic_shapes", None),
    )  # fmt: skip


def _top_names(path: Path) -> set[str]:
    """Names that the file defines or imports at its top level."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return set()  # importing it gives the better error
    names = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in statement.names}
    return names


def module_of(file: UserFile) -> ModuleType:
    """The module of an open file."""
    return sys.modules[module_name(file.path)]


def _builder(path: Path, module: ModuleType) -> tuple[Callable[[DeepseekV3Config], nn.Module], bool]:
    build = getattr(module, "build_model", None)
    if callable(build):
        takes_config = bool(inspect.signature(build).parameters)
        return (build if takes_config else lambda config: build()), takes_config
    if isinstance(getattr(module, "model", None), nn.Module):
        return lambda config: import_file(path).model, False
    if hasattr(module, "Transformer") and dataclasses.is_dataclass(getattr(module, "ModelArgs", None)):
        return lambda config: _deepseek_model(module, config), True
    root = getattr(module, REMOTE_ROOT, None)
    if isinstance(root, type) and root.__module__ == module.__name__ and hasattr(root, "config_class"):
        return lambda config: root(root.config_class(**config.model_dump())), True
    raise FxquantError(path, "defines no build_model.", CONTRACT)


def _deepseek_model(module: ModuleType, config: DeepseekV3Config) -> nn.Module:
    """DeepSeek's inference/model.py as it is: its Transformer with the checkpoint's sizes."""
    known = {field.name for field in dataclasses.fields(module.ModelArgs)}
    given = hf_to_model_args(config) | {"max_batch_size": 1}  # the rows of its caches; copies run one by one
    return module.Transformer(module.ModelArgs(**{key: value for key, value in given.items() if key in known}))


def _text(path: Path, module: ModuleType, name: str) -> str | None:
    value = getattr(module, name, None)
    return None if value is None else str(value)


def _leaves(path: Path, module: ModuleType) -> Leaves:
    leaves = getattr(module, "LEAVES", {})
    sound = isinstance(leaves, dict) and all(
        isinstance(cls, type) and issubclass(cls, nn.Module) and callable(adapter) for cls, adapter in leaves.items()
    )
    if not sound:
        raise FxquantError(path, "LEAVES does not map module classes to adapters.", "See docs/model-file.md, LEAVES.")
    return leaves
