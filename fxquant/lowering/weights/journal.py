"""Which units are finished: one line each, so that work that was killed goes on where it was.

JSON lines. The first is the fingerprint of the work; then `{"unit": …, "digests": {…}}` for each finished unit, and
`{"complete": …}` when all of it is there and about to get its name. A line is written when its unit's bytes are with
the operating system: they outlive the process. Whoever goes on reads them back and compares, so that neither a crash of
the machine nor damage of the disk gets past it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fxquant.errors import FxquantError
from fxquant.inputs.json_file import parse_json
from fxquant.lowering.weights.unit import Filled
from fxquant.storage.system_errors import stopping

Fingerprint = dict[str, Any]
RESTART = "Pass --restart to begin anew."


@dataclass
class Journal:
    """An open journal.

    done      finished units by name
    proven    they were written by this process, or have been compared with what lies on the disk
    identity  of the last complete line: what the documents beside the weights are made of
    """

    path: Path
    stream: TextIO
    done: dict[str, Filled] = field(default_factory=dict)
    proven: bool = True
    identity: str = ""

    def append(self, filled: Filled) -> None:
        """Note a finished unit."""
        self._line({"unit": filled.name, "digests": filled.digests})
        self.done[filled.name] = filled

    def prove(self, good: dict[str, Filled]) -> None:
        """Only these units hold what was written; the others are to be filled again."""
        self.proven = True
        if good.keys() == self.done.keys():
            return
        new = self.path.with_name(self.path.name + ".new")
        with stopping(self.path, "cannot be written"):
            self.stream.seek(0)
            fingerprint = self.stream.readline()
            self.stream.close()
            self.stream = new.open("w+", encoding="utf-8")
            self.stream.write(fingerprint)
        self.done = {}
        for filled in good.values():
            self.append(filled)
        with stopping(self.path, "cannot be written"):
            new.replace(self.path)  # a kill leaves the old lines, or these

    def complete(self, identity: str) -> None:
        """Everything is there."""
        self._line({"complete": identity})
        self.identity = identity

    def _line(self, document: dict[str, Any]) -> None:
        with stopping(self.path, "cannot be written"):
            self.stream.write(json.dumps(document, ensure_ascii=False) + "\n")
            self.stream.flush()


def begin(path: Path, fingerprint: Fingerprint) -> Journal:
    """A new journal."""
    with stopping(path, "cannot be made"):
        journal = Journal(path, path.open("w+", encoding="utf-8"))
    journal._line(fingerprint)
    return journal


def read_fingerprint(path: Path) -> Fingerprint | None:
    """What the work was, or None where it did not come so far as to have a journal."""
    try:
        with stopping(path, "cannot be read"), path.open("rb") as stream:
            line = stream.readline()
    except FxquantError:
        if not path.exists():
            return None
        raise
    document = parse_json(line, path, RESTART) if line.endswith(b"\n") else None
    if document is not None and not isinstance(document, dict):
        raise FxquantError(path, "not a journal: its first line is no object.", RESTART)
    return document


def go_on(path: Path) -> Journal:
    """An earlier journal, to go on with. A last line that was cut off is forgotten."""
    with stopping(path, "cannot be read"):
        stream = path.open("rb+")
        journal, lines, end = Journal(path, stream, proven=False), 0, 0  # type: ignore[arg-type]
        for line in stream:
            if not line.endswith(b"\n"):
                break
            if lines:
                _read_line(journal, line, path)
            lines, end = lines + 1, end + len(line)
        stream.truncate(end)
        stream.close()
        journal.stream = path.open("r+", encoding="utf-8")
        journal.stream.seek(end)
    return journal


def _read_line(journal: Journal, line: bytes, path: Path) -> None:
    document = parse_json(line, path, RESTART)
    match document:
        case {"unit": str(name), "digests": dict(digests)}:
            journal.done[name] = Filled(name, digests)
        case {"complete": str(identity)}:
            journal.identity = identity
        case _:
            raise FxquantError(path, f"a line is not one of a journal: {str(document)[:200]}.", RESTART)
