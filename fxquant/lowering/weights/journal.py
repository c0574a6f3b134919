"""Journal of finished units, one line each, so that killed work resumes where it was.

JSON lines. The first is the fingerprint of the work; then `{"unit": …, "digests": {…}}` for each finished unit, and
`{"complete": …}` when everything is written, before the final rename. A line is written once the operating system has
its unit's bytes: they outlive the process. A run that resumes reads them back and compares, so that it notices what a
crash of the machine or a damaged disk has lost.
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
RESTART = "Pass --restart to start again."


@dataclass
class Journal:
    """An open journal.

    done      finished units by name
    proven    whether these were written by this process, or have been compared with the bytes on disk
    identity  from the last `complete` line: hash of the inputs of the documents beside the weights
    """

    path: Path
    stream: TextIO
    done: dict[str, Filled] = field(default_factory=dict)
    proven: bool = True
    identity: str = ""

    def append(self, filled: Filled) -> None:
        """Record a finished unit."""
        self._line({"unit": filled.name, "digests": filled.digests})
        self.done[filled.name] = filled

    def prove(self, good: dict[str, Filled]) -> None:
        """Keep only these units, whose bytes are as they were written; the others will be filled again."""
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
        """Record that everything is written."""
        self._line({"complete": identity})
        self.identity = identity

    def _line(self, document: dict[str, Any]) -> None:
        with stopping(self.path, "cannot be written"):
            self.stream.write(json.dumps(document, ensure_ascii=False) + "\n")
            self.stream.flush()


def begin(path: Path, fingerprint: Fingerprint) -> Journal:
    """A new journal."""
    with stopping(path, "cannot be created"):
        journal = Journal(path, path.open("w+", encoding="utf-8"))
    journal._line(fingerprint)
    return journal


def read_fingerprint(path: Path) -> Fingerprint | None:
    """The fingerprint of earlier work, or None if that was stopped before it had a journal."""
    try:
        with stopping(path, "cannot be read"), path.open("rb") as stream:
            line = stream.readline()
    except FxquantError:
        if not path.exists():
            return None
        raise
    document = parse_json(line, path, RESTART) if line.endswith(b"\n") else None
    if document is not None and not isinstance(document, dict):
        raise FxquantError(path, "not a journal: its first line is not a JSON object.", RESTART)
    return document


def go_on(path: Path) -> Journal:
    """An earlier journal, opened to be continued. A truncated last line is dropped."""
    with stopping(path, "cannot be read"):
        stream = path.open("rb+")  # bytes: `truncate` needs the byte offset of the last whole line
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
            raise FxquantError(path, f"has a line that is not a journal entry: {str(document)[:200]}.", RESTART)
