"""Checkpoint folder that a model.py names, read from its text: known before anything of it runs."""

import ast
from pathlib import Path

from fxquant.inputs.limits import MIB

NAME = "CHECKPOINT"


def named_checkpoint(file: Path) -> Path | None:
    """The folder of the file's only `CHECKPOINT = "…"`, relative to the file; None unless it is there and plain."""
    try:
        if file.stat().st_size > MIB:
            return None
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # importing it gives the better error
    stores = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == NAME and _writes(node)]
    values = [line.value for line in tree.body if isinstance(line, ast.Assign) and _only_target(line) in stores]
    if len(stores) != 1 or len(values) != 1:
        return None
    value = values[0].value if isinstance(values[0], ast.Constant) else None
    folder = file.parent / value if isinstance(value, str) and "\0" not in value else None
    return folder if folder is not None and folder.is_dir() else None


def _writes(node: ast.Name) -> bool:
    return not isinstance(node.ctx, ast.Load)


def _only_target(line: ast.Assign) -> ast.expr | None:
    return line.targets[0] if len(line.targets) == 1 else None
