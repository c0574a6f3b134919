"""Found folder: weight files, description and config.json of a folder, under whatever names they have."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fxquant.engines.table import description_stems, weight_stems
from fxquant.errors import FxquantError
from fxquant.inputs.json_file import read_json
from fxquant.inputs.limits import CONFIG_BYTES, INDEX_BYTES
from fxquant.inputs.paths import GRAPH, MANIFEST, not_compiled
from fxquant.lowering.output_folder.manifest import FLOAT_GRAPH, LEDGER
from fxquant.schemes.roles import module_and_role
from fxquant.schemes.schemes import Scheme
from fxquant.storage.safetensors import TensorInfo, read_header

CONFIG = "config.json"
INDEX = ".safetensors.index.json"
AGAIN = "Copy the folder again, or quantize the model again."

OWN = (MANIFEST, GRAPH, FLOAT_GRAPH, LEDGER)


@dataclass(frozen=True)
class FoundFolder:
    """A folder as it was found; reads tensors one by one.

    infos         tensor → its place, of every *.safetensors; `twice`: tensor → the two files that have it
    descriptions  name of a file that reads like a description → its content; the one that is used comes first
    config        content of config.json; None without one
    """

    path: Path
    infos: Mapping[str, TensorInfo]
    twice: Mapping[str, tuple[str, str]]
    descriptions: Mapping[str, Mapping[str, Any]]
    config: dict[str, Any] | None

    @property
    def description(self) -> str:
        """Name of the description."""
        return next(iter(self.descriptions))

    @property
    def types(self) -> dict[str, str]:
        """Tensor → type, of all entries."""
        return {name: str(kind) for name, kind in self.descriptions[self.description].items() if "." in name}

    @property
    def header(self) -> dict[str, Any]:
        """Keys of the description that are no tensors."""
        return {key: value for key, value in self.descriptions[self.description].items() if "." not in key}

    @property
    def indexes(self) -> list[Path]:
        """Index files."""
        return sorted(self.path.glob(f"*{INDEX}"))

    @property
    def roles(self) -> dict[str, frozenset[str]]:
        """Module → roles of the tensors that are stored directly under it."""
        found: dict[str, set[str]] = {}
        for name in self.infos:
            module, role = module_and_role(name)
            found.setdefault(module, set()).add(role)
        return {module: frozenset(roles) for module, roles in found.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        return self.infos[name].read()


def is_foreign(folder: Path) -> bool:
    """Whether it has weights and a description, and no file of ours."""
    if not folder.is_dir() or any(os.path.lexists(folder / name) for name in OWN):
        return False
    if _stored_descriptions(folder):
        return True
    return any(folder.glob("*.safetensors")) and (_named_for_engines(folder) or bool(_descriptions(folder, "")))


def find_folder(folder: Path, preferred: str) -> FoundFolder:
    """Open `folder`; of several descriptions the one named `preferred` is used.

    Raises FxquantError if it has no weights, no description, or a file that can't be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise _without_weights(folder)
    infos: dict[str, TensorInfo] = {}
    twice: dict[str, tuple[str, str]] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in infos:
                twice[name] = (infos[name].file.name, file.name)
            infos[name] = info
    descriptions = _descriptions(folder, preferred)
    if not descriptions:
        raise _without_description(folder, preferred)
    config = folder / CONFIG
    document = read_json(config, CONFIG_BYTES, AGAIN, lenient=True) if os.path.lexists(config) else None
    if document is not None and not isinstance(document, dict):
        raise FxquantError(config, "not a JSON object.", AGAIN)
    return FoundFolder(folder, infos, twice, descriptions, document)


def _stored_descriptions(folder: Path) -> list[Path]:
    """Files under the names of descriptions, whatever they hold."""
    return [path for stem in description_stems() if os.path.lexists(path := folder / f"{stem}.json")]


def _without_weights(folder: Path) -> FxquantError:
    """The error for a folder that has a description, or nothing, and no weight file."""
    for index in sorted(folder.glob(f"*{INDEX}")):
        document = read_json(index, INDEX_BYTES, AGAIN)
        listed = document.get("weight_map") if isinstance(document, dict) else None
        if isinstance(listed, dict) and listed:
            names = ", ".join(sorted({str(name)[:80] for name in listed.values()})[:3])
            return FxquantError(folder, f"has no *.safetensors; {index.name} names {names}.", AGAIN)
    if _stored_descriptions(folder):
        return FxquantError(folder, "has a description of tensors, and no *.safetensors.", AGAIN)
    return not_compiled(folder, True)


def _without_description(folder: Path, preferred: str) -> FxquantError:
    remedy = f"Copy {preferred} from where the weights came from."
    for path in _stored_descriptions(folder):
        fact = f'no entry says what a tensor is, such as {{"lm_head.weight": "{Scheme.FLOAT}"}}.'
        return FxquantError(path, fact, remedy)
    beside = ", ".join(sorted(file.name for file in folder.glob("*.json"))) or "no JSON file"
    return FxquantError(folder, f"has no description of its tensors: there is {beside}.", remedy)


def _named_for_engines(folder: Path) -> bool:
    return any(any(folder.glob(f"{stem}*")) for stem in (*weight_stems(), *description_stems()))


def _descriptions(folder: Path, preferred: str) -> dict[str, dict[str, Any]]:
    """Every JSON file that gives types to weights: the preferred one, then those that engines read, then others."""
    found = {}
    for file in folder.glob("*.json"):
        if file.name == CONFIG or file.name.endswith(INDEX) or file.name.startswith("tokenizer"):
            continue
        document = read_json(file, INDEX_BYTES, AGAIN) if file.stem in description_stems() else _perhaps(file)
        if isinstance(document, dict) and any(_is_entry(key, value) for key, value in document.items()):
            found[file.name] = document
    known = {f"{stem}.json" for stem in description_stems()}
    order = sorted(found, key=lambda name: (name != preferred, name not in known, name))
    return {name: found[name] for name in order}


def _perhaps(file: Path) -> Any:
    try:
        return read_json(file, INDEX_BYTES, AGAIN)
    except FxquantError:  # some other tool's
        return None


def _is_entry(key: str, value: object) -> bool:
    return "." in key and value in list(Scheme)
