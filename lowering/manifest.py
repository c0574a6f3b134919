"""fxquant_manifest.json: what an output folder is and where it came from."""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fxquant.errors import FxquantError

MANIFEST = "fxquant_manifest.json"
GRAPH = "fxquant_graph.json"
FLOAT_GRAPH = "fxquant_float_graph.json"
LEDGER = "fxquant_ledger.json"


class Manifest(BaseModel):
    """Paths are relative to the output folder, so that a folder and its source can move together."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    fxquant: str
    source: str
    checkpoint: str
    policy: str
    target: str
    files: dict[str, int]

    def source_path(self, folder: Path) -> Path:
        """MODEL as it was named to `compile`."""
        return (folder / self.source).resolve()

    def checkpoint_path(self, folder: Path) -> Path:
        """The folder the weights came from."""
        return (folder / self.checkpoint).resolve()


def relative(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, with forward slashes."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def file_sizes(folder: Path) -> dict[str, int]:
    """Every file of `folder` but the manifest, with its size."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != MANIFEST}


def read_manifest(folder: Path) -> Manifest:
    """Raises FxquantError for a folder that fxquant did not write."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FxquantError(folder, f"not an output of fxquant: it has no {MANIFEST}.", "Name a compiled folder.")
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        return Manifest.model_validate(document)
    except (ValidationError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise FxquantError(path, f"cannot be read: {first}.", "Compile again.") from None
