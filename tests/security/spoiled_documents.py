"""Documents spoiled in one place: their places, and their text."""

import copy
import json
from collections.abc import Iterator
from typing import Any


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of everything inside a document, itself left out."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def pattern(document: dict[str, Any], path: tuple) -> tuple:
    """Which sort of place it is: the same field of two nodes of one operator is one sort."""
    if path[0] == "nodes" and len(path) > 1:
        return (document["nodes"][path[1]]["target"].split(".")[0], *path[2:])
    depth = 3 if path[:2] == ("mtp", "recipes") else 2
    named = path[0] in ("parameters", "recipes", "rules") or path[:2] in [("mtp", "recipes"), ("mtp", "float_tensors")]
    parts = (path[0], *path[depth:]) if named and len(path) >= depth else path
    return tuple(part if isinstance(part, str) else "*" for part in parts)


def spoiled(document: dict[str, Any], path: tuple, value: Any, gone: bool = True) -> Iterator[dict[str, Any]]:
    """The document with another value at `path`, then, if so wanted, with the key gone, then under another name."""
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    original = copy.copy(owner)
    owner[path[-1]] = value
    yield document
    del owner[path[-1]]
    if gone:
        yield document
    if isinstance(owner, dict) and isinstance(value, str):
        owner[value] = original[path[-1]]
        yield document
    owner.clear()
    owner.extend(original) if isinstance(owner, list) else owner.update(original)


class Text:
    """JSON text of a document that changes in one place at a time: what is beside that place is not written again."""

    def __init__(self, value: Any, depth: int = 2) -> None:
        """`depth`: of the parts that are kept, here the fields of the document and the entries of each."""
        self.whole = json.dumps(value)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        self._parts = {key: Text(part, depth - 1) for key, part in items if depth}

    def changed(self, value: Any, path: tuple) -> str:
        """That of `value`, which differs at `path` alone."""
        if len(path) == 1 or not self._parts:
            return json.dumps(value)
        key, *rest = path
        texts = {name: part.whole for name, part in self._parts.items()}
        texts[key] = self._parts[key].changed(value[key], tuple(rest))
        if isinstance(value, list):
            return f"[{', '.join(texts.values())}]"
        return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in texts.items()) + "}"
