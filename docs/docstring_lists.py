"""Docstrings of the reference: columns `name   meaning` become a list, for mkdocstrings."""

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*) {2,}(\S.*)$")
MORE = re.compile(r"^ {8,}(\S.*)$")


class AlignedLists(griffe.Extension):
    """griffe calls it for everything that it read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of `obj`."""
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text: str) -> str:
    """The docstring, each aligned entry an item of a list, with the lines that continue it."""
    lines: list[str] = []
    for line in text.splitlines():
        entry, more = ENTRY.match(line), MORE.match(line)
        if entry:
            lines += [] if lines and (not lines[-1] or lines[-1].startswith("- ")) else [""]
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif more and lines and lines[-1].startswith("- "):
            lines[-1] += f" {more[1]}"
        else:
            lines.append(line)
    return "\n".join(lines)
