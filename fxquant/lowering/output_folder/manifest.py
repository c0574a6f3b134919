"""Manifest, fxquant_manifest.json: the files of an output folder, their hashes, and what they were made from."""

import os
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fxquant.engines.serving import RankLayout
from fxquant.engines.table import Target, description_stems, weight_stems
from fxquant.errors import FxquantError
from fxquant.inputs.json_file import read_json
from fxquant.inputs.limits import FILE_NAME_BYTES, GRAPH_BYTES, NAME_LENGTH, RANKS
from fxquant.inputs.paths import GRAPH, MANIFEST, not_compiled
from fxquant.inputs.validation import validation_fact

FLOAT_GRAPH = "fxquant_float_graph.json"
LEDGER = "fxquant_ledger.json"
STAMPS = "fxquant_stamps.json"
"""States of the source's files on this machine: the only file of an output that differs on another machine."""


PATH_LENGTH = 2048
"""Maximum bytes of a path; half of Linux's limit, to leave room for the folder before it."""


def _within(name: str) -> str:
    """A path below a folder, in normal form."""
    path = PurePosixPath(name)
    plain = path.parts and ".." not in path.parts and not path.is_absolute() and str(path) == name
    if not plain or not _possible(name):
        raise ValueError(f"not a path within the folder: {name[:200]!r}")
    return name


def _path(name: str) -> str:
    if not _possible(name):
        raise ValueError(f"not a path: {name[:200]!r}")
    return name


def _possible(name: str) -> bool:
    """Whether a file system can have such a path: the system raises an error even for looking up a longer one."""
    data = name.encode(errors="surrogatepass")
    return b"\0" not in data and len(data) <= PATH_LENGTH and max(map(len, data.split(b"/"))) <= FILE_NAME_BYTES


def _target(name: str) -> str:
    if name not in list(Target):
        raise ValueError(f"not a target: {name[:200]!r}")
    return name


Bytes = Annotated[int, Field(ge=0, lt=1 << 63)]
Digest = Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")]
Name = Annotated[str, Field(max_length=NAME_LENGTH)]
FilePath = Annotated[str, AfterValidator(_within)]
FolderPath = Annotated[str, AfterValidator(_path)]
TargetName = Annotated[str, AfterValidator(_target)]


class SourceFile(BaseModel):
    """A file of the checkpoint: XXH3-128 of its header in hex, and its bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    header: Digest
    size: Bytes


class UnitRecord(BaseModel):
    """One module, or one float tensor: hashes of its inputs and of its bytes.

    key      hash of source identity, scheme and arguments, kernel version: equal keys mean equal bytes
    digests  suffix of each tensor's name ("" for a float one) → XXH3-128 of its bytes, in hex
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    key: Name
    digests: dict[Name, Digest]


class Manifest(BaseModel):
    """Paths are relative to the output folder, so that a folder and its source can move together.

    kernels  version of the weight kernels
    tp       tensor-parallel ranks it was checked for, and `ep`, expert-parallel ones; 1 where none were asked for
    graph_only  it is for the graph beside the weights alone, no engine is promised
    sources  file of the checkpoint → its header's hash and its size
    files    name → size in bytes, of every file except this one and the stamps
    digests  name → XXH3-128 in hex, of every file except weight files
    weights  weight file → XXH3-128 of its header; the units have the digests of its data
    units    module or float tensor → key and digests
    foreign  others chose the integers, and no policy says which; written only if it is so
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    fxquant: Name
    kernels: int
    source: FolderPath
    checkpoint: FolderPath
    policy: Name
    target: TargetName
    tp: Annotated[int, Field(ge=1, le=RANKS)] = 1
    ep: Annotated[int, Field(ge=1, le=RANKS)] = 1
    graph_only: bool = False
    sources: dict[FilePath, SourceFile]
    files: dict[FilePath, Bytes]
    digests: dict[FilePath, Digest]
    weights: dict[FilePath, Digest]
    units: dict[Name, UnitRecord]
    foreign: bool = False

    @property
    def layout(self) -> RankLayout:
        """Its ranks."""
        return RankLayout(self.tp, self.ep)

    def source_path(self, folder: Path) -> Path:
        """MODEL as given to `compile`."""
        return (folder / self.source).resolve()

    def checkpoint_path(self, folder: Path) -> Path:
        """The folder the weights came from."""
        return (folder / self.checkpoint).resolve()


def relative(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, with forward slashes."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def file_sizes(folder: Path) -> dict[str, int]:
    """Relative path → size, of every file in `folder` except the manifest and the stamps."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: file.stat().st_size for name, file in files.items() if name not in (MANIFEST, STAMPS)}


def _for_engine(folder: Path) -> bool:
    """Whether it has a file with a name that some engine reads."""
    return any(any(folder.glob(f"{stem}*")) for stem in (*weight_stems(), *description_stems()))


def find_manifest(folder: Path) -> Manifest | None:
    """The manifest; None if it was deleted. Raises FxquantError for a folder that fxquant did not write."""
    if (folder / MANIFEST).exists():
        return read_manifest(folder)
    if (folder / GRAPH).is_file():
        return None
    raise not_compiled(folder, _for_engine(folder))


def read_manifest(folder: Path) -> Manifest:
    """The manifest. Raises FxquantError for a folder that fxquant did not write."""
    path = folder / MANIFEST
    if not path.is_file():
        raise not_compiled(folder, _for_engine(folder))
    document = read_json(path, GRAPH_BYTES, "Compile again.")
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        fact = f"cannot be read: {validation_fact(error, Manifest, document)}"
        raise FxquantError(path, fact, "Compile again.") from None
