"""Own files of an output folder: those that its manifest lists, the manifest, and the stamps.

A manifest is data from outside: an entry counts only if it is a plain path inside the folder. Only regular files are
removed, one by one, then the folders that are empty.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fxquant.errors import FxquantError
from fxquant.lowering.output_folder.manifest import MANIFEST, STAMPS, Manifest, read_manifest
from fxquant.storage.system_errors import stopping
from fxquant.storage.work_folder import is_folder, listed, walk

CACHE = "__pycache__"
"""Folder of the bytecode that Python writes when somebody imports our own `.py` files."""


@dataclass(frozen=True)
class Survey:
    """Contents of an output folder. Paths are relative, with forward slashes.

    own      regular files that belong to the output
    folders  those that hold its files, inner ones first
    others   everything else: files, folders, links
    """

    own: list[str]
    folders: list[str]
    others: set[str]


def survey(folder: Path) -> Survey:
    """Raise FxquantError if the manifest cannot be read or lists a path outside of the folder."""
    names = own_names(read_manifest(folder), folder)
    parents = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents} - {"."}
    stems = {PurePosixPath(name).stem for name in names if name.endswith(".py") and "/" not in name}
    own, folders, others = [], [], set()
    with stopping(folder, "cannot be listed"):
        for path in walk(folder):
            name = path.relative_to(folder).as_posix()
            if any(parent.as_posix() in others for parent in PurePosixPath(name).parents):
                continue
            regular = path.is_file() and not path.is_symlink()
            if is_folder(path) and (name in parents or (name == CACHE and stems)):
                folders.append(name)
            elif regular and (name in names or _compiled(name, stems)):
                own.append(name)
            else:
                others.add(name)
    return Survey(own, folders[::-1], others)


def own_names(manifest: Manifest, folder: Path) -> set[str]:
    """The files that `manifest` lists with a digest, plus itself and the stamps."""
    for name in manifest.files:
        if not is_plain(name):
            fact = f"lists a file outside of its folder: {name[:200]!r}."
            raise FxquantError(folder / MANIFEST, fact, "Choose another -o, and find out who changed it.")
    written = manifest.digests.keys() | manifest.weights.keys()
    return {*(manifest.files.keys() & written), MANIFEST, STAMPS}


def is_plain(name: str) -> bool:
    """Whether it is a relative path without `..`, in normal form."""
    path = PurePosixPath(name)
    way = bool(path.parts) and ".." not in path.parts and not path.is_absolute()
    return way and "\0" not in name and str(path) == name


def refuse_others(folder: Path) -> None:
    """Raise FxquantError if `folder` holds anything that does not belong to the output."""
    others = survey(folder).others
    if others:
        fact = f"holds files that are not part of this output: {listed(others)}."
        raise FxquantError(folder, fact, "Move it elsewhere, or choose another -o: fxquant deletes only what it made.")


def remove_output(folder: Path) -> None:
    """Remove an output's own files and then the folder, the manifest last: until then it says which files are ours.

    Raises FxquantError, before a file is removed, if the folder holds anything else.
    """
    with stopping(folder, "cannot be removed"):
        if any(folder.iterdir()):
            refuse_others(folder)
            surveyed = survey(folder)
            for name in sorted(surveyed.own, key=lambda name: (name == MANIFEST, name)):
                if name == MANIFEST:
                    _remove_folders(folder, surveyed.folders)
                (folder / name).unlink()
        folder.rmdir()


def _remove_folders(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).rmdir()


def _compiled(name: str, stems: set[str]) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) == 2 and parts[0] == CACHE and name.endswith(".pyc") and parts[1].split(".")[0] in stems
