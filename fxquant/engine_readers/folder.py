"""Weight folder as an engine sees it: config, description, and tensors checked one module at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxquant.errors import FxquantError

_DTYPES = {
    "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip
_LARGEST = 1 << 28
"""Most bytes of a JSON file: a few lines per tensor."""
_MODEL_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Expected:
    """Shape and dtypes in which an engine takes one tensor of a module; `required`: the engine fails without it."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    required: bool = True


class WeightFolder:
    """Names → tensors of every `*.safetensors` in a folder, beside its config.json and its description.

    Raises FxquantError if a file is missing, a tensor is in two files, or an index disagrees.
    """

    def __init__(self, folder: Path, description: str) -> None:
        self.path = folder
        self.config = _read_json(folder, "config.json")
        self.description_name = description
        self.description = _read_json(folder, description)
        self._headers: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._files = self._list_tensors()
        self._suffixes: dict[str, list[str]] = {}
        for name in sorted(self._files):
            module, _, suffix = name.rpartition(".")
            self._suffixes.setdefault(module, []).append(suffix)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype, in which engines allocate their float parameters."""
        name = str(self.config.get("torch_dtype", self.config.get("dtype")))
        if name not in _MODEL_DTYPES:
            raise FxquantError(
                self.path / "config.json", f"torch_dtype is {name}; the engines run bfloat16 and float16.", "Set one."
            )
        return _MODEL_DTYPES[name]

    def type_of(self, module: str) -> str:
        """The type of a module: the description's entry for its weight, which all its tensors but `.bias` share."""
        types = {}
        for suffix in {*self.suffixes(module), "weight"} - {"bias"}:
            name = f"{module}.{suffix}"
            if name not in self.description:
                raise FxquantError(self.path / self.description_name, f"{name} is missing.", "Describe every tensor.")
            types[name] = str(self.description[name])
        if len(set(types.values())) != 1:
            raise FxquantError(module, f"its tensors are described as {types}.", "Give them one type.")
        return types[f"{module}.weight"]

    def suffixes(self, module: str) -> tuple[str, ...]:
        """Suffixes of the tensors stored directly under a module."""
        return tuple(self._suffixes.get(module, ()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one stored tensor."""
        return self._header(name)[1]

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored: a copy, as pages of a file that stays mapped count as memory."""
        self._header(name)
        return _open(self._files[name]).get_tensor(name).clone()

    def load(self, module: str, expected: Mapping[str, Expected]) -> dict[str, Tensor]:
        """Suffix → tensor, for the suffixes that are stored.

        Raises FxquantError for a missing required tensor, one that the engine has no parameter for, and any other
        shape or dtype than expected: today's engines silently copy a smaller tensor into part of a parameter.
        """
        for suffix in self.suffixes(module):
            if suffix not in expected:
                fact = f"the engine has no parameter for it; it takes {', '.join(expected)}."
                raise FxquantError(f"{module}.{suffix}", fact, "Leave it out.")
        loaded = {}
        for suffix, want in expected.items():
            name = f"{module}.{suffix}"
            if suffix in self.suffixes(module):
                self._check(name, want)
                loaded[suffix] = self.tensor(name)
            elif want.required:
                raise FxquantError(name, "missing.", "The engine does not load without it: write it.")
        return loaded

    def _check(self, name: str, want: Expected) -> None:
        stored, shape = self._header(name)
        dtype = _DTYPES.get(stored)
        if dtype not in want.dtypes or shape != want.shape:
            takes = " or ".join(str(dtype).removeprefix("torch.") for dtype in want.dtypes)
            fact = f"{stored} {list(shape)}; the engine takes {takes} {list(want.shape)}."
            raise FxquantError(name, fact, "Write it in this dtype and shape.")

    def _header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype, by its name in the file, and shape."""
        if name not in self._files:
            raise FxquantError(name, f"missing in {self.path}.", "The engine does not load without it: write it.")
        return self._headers[name]

    def _list_tensors(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            opened = _open(file)
            for name in opened.keys():  # noqa: SIM118, not a mapping
                if name in files:
                    raise FxquantError(name, f"is in {files[name].name} and in {file.name}.", "Store it once.")
                files[name], stored = file, opened.get_slice(name)
                self._headers[name] = stored.get_dtype(), tuple(stored.get_shape())
        if not files:
            raise FxquantError(self.path, "holds no *.safetensors.", "Compile into it first.")
        for index in sorted(self.path.glob("*.safetensors.index.json")):
            _check_index(index, files)
        return files


def _open(file: Path) -> Any:
    try:
        if not file.is_file():
            raise FxquantError(file, "not a regular file.", "Compile again.")
        return safe_open(file, "pt").__enter__()
    except (OSError, SafetensorError) as error:
        raise FxquantError(file, f"not readable: {str(error)[:200]}.", "Write it again.") from error


def stated_number(place: Path, document: Mapping[str, Any], key: str) -> int:
    """The number that a header or a config has under `key`, 0 without one. Raises FxquantError for other values."""
    value = document.get(key) or 0
    if type(value) is not int or value < 0:
        raise FxquantError(place, f"{key} {str(value)[:40]}: not a whole number.", "Write it again.")
    return value


def stated_group_size(place: Path, document: Mapping[str, Any], default: int = 0) -> int:
    """The group size of a header, `default` without one. Engines compare what they find with 0, so that null is no
    number either. Raises FxquantError for other values."""
    value = document.get("group_size", default)
    if type(value) is not int or value < 0:
        raise FxquantError(place, f"group_size {str(value)[:40]}: not a whole number.", "Write it again.")
    return value


def _check_index(index: Path, files: Mapping[str, Path]) -> None:
    listed = _read_json(index.parent, index.name).get("weight_map", {})
    if not isinstance(listed, dict):
        raise FxquantError(index, "its weight_map is not a JSON object.", "Write the index again.")
    for name in sorted(set(listed) | set(files)):
        stored = files[name].name if name in files else None
        if listed.get(name) != stored:
            raise FxquantError(index, f"{name} in {listed.get(name)}, stored in {stored}.", "Write the index again.")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.exists():
        beside = ", ".join(sorted(file.name for file in folder.glob("*.json"))) or "no JSON file"
        raise FxquantError(path, f"missing; there is {beside}.", "The engine looks for this name.")
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:  # a pipe would wait for ever
            raise FxquantError(path, f"not a file of at most {_LARGEST:,} bytes.", "Write it again.")
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FxquantError(path, f"not readable: {str(error)[:200]}.", "Write it again.") from error
    if not isinstance(document, dict):
        raise FxquantError(folder / name, "not a JSON object.", "Write it again.")
    return document
