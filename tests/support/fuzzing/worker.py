"""Cases one after another in one process: made from a seed, written, read, judged."""

import gc
import json
import traceback
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from fuzzing.guard import LARGEST, SECONDS, Guard, Hang, largest_memory, now
from fuzzing.hostile import CANARY
from fuzzing.mutators import Mutator
from fuzzing.targets import Target, make_case
from fxquant.errors import FxquantError

ACCEPTED, REFUSED, TRACEBACK, HANG, MEMORY, FORBIDDEN = (
    "accepted",
    "refused",
    "traceback",
    "hang",
    "memory",
    "forbidden",
)
KINDS = (ACCEPTED, REFUSED, TRACEBACK, HANG, MEMORY, FORBIDDEN)
LONGEST_MESSAGE = 20_000
"""Characters of an error: more is no screen, whoever cuts it."""


@dataclass(frozen=True)
class Finding:
    """A case that ended otherwise than in success or in an FxquantError, with what is needed to do it again.

    where  the last places in the program that the traceback names: what is the same there is one fault
    """

    target: str
    file: str
    data: str
    kind: str
    fact: str
    where: str
    index: int

    def save(self, folder: Path) -> Path:
        """`<target>-<index>.json` in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.target.replace(' ', '_').replace('/', '_')}-{self.index}.json"
        path.write_text(json.dumps(asdict(self), indent=1))
        return path


def load_finding(path: Path) -> tuple[Finding, bytes]:
    """What `Finding.save` wrote, and the damaged file."""
    finding = Finding(**json.loads(path.read_text()))
    return finding, b64decode(finding.data)


def judge(target: Target, folder: Path, guard: Guard) -> tuple[str, str, str]:
    """Read `folder`; the kind of the outcome, a fact, and where it comes from."""
    kind, fact, where = ACCEPTED, "", ""
    start = now()
    try:
        with guard.watch(target.allowed):
            target.read(folder)
    except FxquantError as error:
        kind, fact = _refusal(error)
    except Hang as error:
        kind, fact, where = HANG, str(error), _where(error)
    except MemoryError as error:
        kind, fact, where = MEMORY, repr(error), _where(error)
    except BaseException as error:
        kind, fact, where = TRACEBACK, f"{type(error).__name__}: {error!s:.300}", _where(error)
    if guard.violations:
        return FORBIDDEN, guard.violations[0], guard.violations[0][:80]
    if Path(CANARY).exists():
        return FORBIDDEN, "the code of a case ran", "canary"
    if now() - start > SECONDS:
        return HANG, f"{now() - start:.1f} seconds", where or fact[:80]
    if largest_memory() > LARGEST:
        return MEMORY, f"{largest_memory():,} bytes", "memory"
    return kind, fact, where


def _refusal(error: FxquantError) -> tuple[str, str]:
    text = str(error)
    try:
        text.encode()
    except UnicodeEncodeError:
        return TRACEBACK, "its message cannot be written"
    return (REFUSED, text) if len(text) < LONGEST_MESSAGE else (TRACEBACK, f"a message of {len(text)} characters")


def _where(error: BaseException) -> str:
    """The innermost frame, and the innermost of fxquant."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/fuzzing/" not in frame.filename and "site-packages" not in frame.filename]
    selected = (*own[-1:], *frames[-1:])
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in selected)


@dataclass
class Tally:
    """How many cases ended in each kind, and the findings: the first few of each fault."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    memory: int = 0

    def add(self, target: Target, case: tuple[int, str, bytes], outcome: tuple[str, str, str]) -> None:
        """Count one case; keep it where it is a finding."""
        (index, file, data), (kind, fact, where) = case, outcome
        self.counts[kind] += 1
        self.memory = max(self.memory, largest_memory())
        if kind in (ACCEPTED, REFUSED):
            return
        fault = f"{kind} {where} {fact.split(':')[0]}"
        self.faults[fault] += 1
        if self.faults[fault] <= 2:
            self.findings.append(Finding(target.name, file, b64encode(data).decode(), kind, fact, where, index))


def run_cases(
    target: Target,
    folder: Path,
    mutators: dict[str, Mutator],
    seed: int,
    cases: range,
    guard: Guard,
    begun: Callable[[int], None] = lambda index: None,
) -> Tally:
    """Cases of these numbers on the copy of the seeds at `folder`. `begun` is told of each before it starts."""
    tally = Tally()
    originals = {name: (folder / name).read_bytes() for name in mutators}
    gc.freeze()  # what the imports made is never garbage
    for index in cases:
        begun(index)
        file, data = make_case(mutators, Random(f"{seed} {target.name} {index}"))
        (folder / file).write_bytes(data)
        tally.add(target, (index, file, data), judge(target, folder, guard))
        (folder / file).write_bytes(originals[file])
    return tally
