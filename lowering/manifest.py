"""fxquant_manifest.json: what an output folder is and where it came from."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fxquant.errors import FxquantError
from fxquant.progress import Advance

MANIFEST = "fxquant_manifest.json"
GRAPH = "fxquant_graph.json"
FLOAT_GRAPH = "fxquant_float_graph.json"
LEDGER = "fxquant_ledger.json"
DIGEST_BYTES = 32


class Manifest(BaseModel):
    """Paths are relative to the output folder, so that a folder and its source can move together.

    tp       tensor-parallel ranks it was compiled for
    files    name → size in bytes, of every file but this one
    blake2b  name → BLAKE2b of 32 bytes (RFC 7693), in hexadecimal
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    fxquant: str
    source: str
    checkpoint: str
    policy: str
    target: str
    tp: int = 1
    files: dict[str, int]
    blake2b: dict[str, str]

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


def file_digests(folder: Path, advance: Advance = lambda amount: None) -> dict[str, str]:
    """Every file of `folder` but the manifest, with its digest; `advance` counts bytes.

    Weight files are filled in any order, so this reads them once more, several at a time: hashing releases the lock.
    """
    sizes = file_sizes(folder)
    digests = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, digest in zip(sizes, pool.map(lambda name: _digest(folder / name), sizes), strict=True):
            digests[name] = digest
            advance(sizes[name])
    return digests


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()


def find_manifest(folder: Path) -> Manifest | None:
    """None where the manifest was deleted from an output. Raises FxquantError for what fxquant did not write."""
    return None if (folder / GRAPH).is_file() and not (folder / MANIFEST).exists() else read_manifest(folder)


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
