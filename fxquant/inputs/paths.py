"""Path errors: what a given path really is, and what the command expects instead."""

import difflib
import shlex
from itertools import islice
from pathlib import Path

from fxquant.errors import FxquantError

MANIFEST, GRAPH = "fxquant_manifest.json", "fxquant_graph.json"
WORK = (".partial", ".calibrating", ".replaced")
SIBLINGS = 1000
"""Directory entries compared with a missing name."""
COMPILED, MODEL = "Pass a compiled folder.", "Pass a Hugging Face checkpoint folder or a model.py."


def not_compiled(path: Path, for_engine: bool = False) -> FxquantError:
    """The error for a path that is not a compiled folder; `for_engine`: it has files as some engine reads them."""
    if not path.exists():
        return _missing(path, "no such folder.", COMPILED)
    if not path.is_dir():
        inside = (path.parent / MANIFEST).is_file()
        return FxquantError(path, "a file, not a folder.", f"Pass its folder: {path.parent}" if inside else COMPILED)
    if path.name.endswith(WORK):
        return FxquantError(path, "unfinished work, not an output of fxquant.", "Run its command again to finish it.")
    if (path / "config.json").is_file() and not for_engine:
        fact = f"a model, not an output of fxquant: it has no {MANIFEST}."
        return FxquantError(path, fact, f"Compile it first:\nfxquant compile {shlex.quote(str(path))}")
    what = f"it has neither {MANIFEST} nor {GRAPH}" if any(path.iterdir()) else "it is empty"
    return FxquantError(path, f"not an output of fxquant: {what}.", COMPILED)


def not_a_model(path: Path, remedy: str = MODEL) -> FxquantError | None:
    """The error for a path that is not a model; None if it may be one."""
    if not path.exists():
        return _missing(path, "no such file or folder.", remedy)
    if (path / MANIFEST).is_file():
        return FxquantError(path, "a compiled folder, not a model.", "Pass the model that it was compiled from.")
    if path.is_dir() or (path.suffix == ".py" and path.is_file()):
        return None
    fact = "neither a folder nor a .py file."
    inside = path.is_file() and ((path.parent / "config.json").is_file() or (path.parent / MANIFEST).is_file())
    return FxquantError(path, fact, f"Pass its folder: {path.parent}" if inside else remedy)


def _missing(path: Path, fact: str, remedy: str) -> FxquantError:
    if path.is_symlink():
        return FxquantError(path, f"a link to {path.readlink()}, which does not exist.", remedy)
    near = difflib.get_close_matches(path.name, _names(path.parent), n=3)
    beside = f" Similar names there: {', '.join(near)}." if near else ""
    return FxquantError(path, fact, remedy + beside)


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in islice(folder.iterdir(), SIBLINGS)]
    except OSError:
        return []
