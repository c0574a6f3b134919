"""Which units are finished: one line each, so that work that was killed goes on where it was.

JSON lines. The first is the fingerprint of the work; then `{"unit": …, "digests": {…}}` for each finished unit, and
`{"boot": …}` for each start of the machine that had its say. A line is written when its unit's bytes are with the
operating system: they outlive the process. After another start of the machine they are read back and compared.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fxquant.errors import FxquantError, StoppedError
from fxquant.lowering.weights.unit import Filled

Fingerprint = dict[str, Any]
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class Journal:
    """An open journal. `done`: finished units by name; `proven`: they were written since this machine was started."""

    stream: TextIO
    done: dict[str, Filled] = field(default_factory=dict)
    proven: bool = True

    def append(self, filled: Filled) -> None:
        """Note a finished unit."""
        self._line({"unit": filled.name, "digests": filled.digests})
        self.done[filled.name] = filled

    def prove(self, good: dict[str, Filled]) -> None:
        """Only these units hold what was written; the others are to be filled again."""
        self.stream.seek(0)
        fingerprint = self.stream.readline()
        self.stream.seek(0)
        self.stream.truncate()
        self.stream.write(fingerprint)
        self.done = {}
        for filled in good.values():
            self.append(filled)
        self.mark_boot()
        self.proven = True

    def mark_boot(self) -> None:
        """Say which start of the machine this is."""
        self._line({"boot": boot_id()})

    def _line(self, document: dict[str, Any]) -> None:
        try:
            self.stream.write(json.dumps(document, ensure_ascii=False) + "\n")
            self.stream.flush()
        except OSError as error:
            raise StoppedError(self.stream.name, f"cannot be written: {error.strerror}.", "Free space.") from None


def begin(path: Path, fingerprint: Fingerprint) -> Journal:
    """A new journal."""
    journal = Journal(path.open("w+", encoding="utf-8"))
    journal._line(fingerprint)
    journal.mark_boot()
    return journal


def read_fingerprint(path: Path) -> Fingerprint | None:
    """What the work was, or None where it did not come so far as to have a journal."""
    try:
        with path.open(encoding="utf-8") as stream:
            line = stream.readline()
        return json.loads(line) if line.endswith("\n") else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FxquantError(path, f"not a journal: {error}.", "Pass --restart to begin anew.") from None


def go_on(path: Path) -> Journal:
    """An earlier journal, to go on with. A last line that was cut off is forgotten."""
    stream = path.open("r+", encoding="utf-8")
    done: dict[str, Filled] = {}
    boots: list[str] = []
    stream.readline()
    end = stream.tell()
    while (line := stream.readline()).endswith("\n"):
        end = stream.tell()
        try:
            document = json.loads(line)
            if "boot" in document:
                boots.append(document["boot"])
            else:
                filled = Filled(document["unit"], document["digests"])
                done[filled.name] = filled
        except (ValueError, TypeError, KeyError) as error:
            raise FxquantError(path, f"a line is not one of a journal: {error!r}.", "Pass --restart.") from None
    stream.seek(end)
    stream.truncate()
    proven = bool(boots) and boots[-1] == boot_id() != ""
    return Journal(stream, done, proven)


def boot_id() -> str:
    """Which start of the machine this is; empty where the system does not tell."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
