"""Remote code: Python files that `auto_map` of a checkpoint's JSON files names. They are copied as data, never run."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

AUTO_MAP = "auto_map"
CLASS = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,99})\.[A-Za-z_][A-Za-z0-9_]{0,99}")
"""`module.Class`. Transformers also knows `repository--module.Class`: code that is in another repository."""
IMPORT = re.compile(rb"^[ \t]*(?:from[ \t]+\.([A-Za-z_]\w{0,99})[ \t]+import|import[ \t]+\.([A-Za-z_]\w{0,99}))", re.M)
OWN = ("model_ascend", "fxquant_")
"""Beginnings of names that are the compiler's own."""
LARGEST = 1 << 20
"""Bytes of one file; DeepSeek-V3's model code has 76 thousand."""
MOST = 32


def code_files(document: Mapping[str, Any], folder: Path) -> dict[str, Path] | None:
    """Name → file beside `document`, a JSON file of `folder`: the modules that its auto_map names, and what these
    import from beside them. None unless all that it names can be copied; empty without an auto_map."""
    if AUTO_MAP not in document:
        return {}
    modules = _named(document[AUTO_MAP])
    if modules is None or not all(_is_code(folder / f"{module}.py") for module in modules):
        return None
    files: dict[str, Path] = {}
    while modules:
        file = folder / f"{modules.pop()}.py"
        if file.name in files or not _is_code(file):
            continue
        if len(files) == MOST:
            return None
        files[file.name] = file
        modules += [(first or second).decode() for first, second in IMPORT.findall(file.read_bytes())]
    return files


def _named(auto_map: Any) -> list[str] | None:
    """Its modules; None if an entry is none of the folder's."""
    if not isinstance(auto_map, dict):
        return None
    matches = [CLASS.fullmatch(name) if isinstance(name, str) else None for name in _entries(auto_map)]
    modules = [match[1] for match in matches if match is not None]
    return modules if modules and len(modules) == len(matches) else None


def _entries(auto_map: dict[str, Any]) -> Iterator[Any]:
    """Classes; a tokenizer has a pair, of which one may be null."""
    for value in auto_map.values():
        yield from (name for name in value if name is not None) if isinstance(value, list) else (value,)


def _is_code(file: Path) -> bool:
    return not file.name.startswith(OWN) and file.is_file() and file.stat().st_size <= LARGEST
