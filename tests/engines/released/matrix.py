"""The matrix of released engines: `python tests/engines/released/matrix.py [--write] [--faults] [--newest]`.

Prints markdown: engine release x policy x ranks x parallelism, with the engines' own words. --write puts it into
docs/targets.md, between its marks. --faults prints, or writes, which faults in the bytes an engine serves. --newest
runs the newest release of vllm-ascend and says what it does otherwise than the newest one that is recorded.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import torch
from outcome import Outcome, table
from places import ROOT
from planted_faults import fault_table, plant, seen
from released import newest
from vllm_ascend_folders import make
from vllm_ascend_runs import ENGINE, RELEASES, outcomes

PAGE = ROOT / "docs" / "targets.md"
PLACES = ("vllm-ascend", "faults")
"""Names of the tables, in the marks around them."""


def main() -> int:
    """1 where the newest release does something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--newest", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fxquant-engines-") as scratch:
        if options.newest:
            changes = list(_drift(Path(scratch), newest(ENGINE)))
            print("\n".join(changes) or "nothing changed")
            return 1 if changes else 0
        root = Path(scratch)
        text = _faults(root) if options.faults else table(outcomes(RELEASES, make(root).runs))
        if options.write:
            _write(text, PLACES[options.faults])
        print(text)
    return 0


def _faults(root: Path) -> str:
    planted = list(plant(root, verify=True))
    return fault_table(seen(planted), {(fault.name, fault.form): fault.missed for fault in planted})


def _drift(root: Path, release: str) -> Iterator[str]:
    """A line for every run of which the verdict is another."""
    runs = make(root).runs
    both = outcomes([RELEASES[-1], release], runs)
    before, after = both[: len(runs)], both[len(runs) :]
    for old, new in zip(before, after, strict=True):
        if old.verdict is not new.verdict:
            yield f"{new.policy} on {new.ranks} ranks, {new.parallel.upper()}: {_said(old)}; now {_said(new)}"


def _said(outcome: Outcome) -> str:
    return f"{outcome.release} {outcome.verdict.value}" + (f" ({outcome.words})" if outcome.words else "")


def _write(text: str, name: str) -> None:
    begin, end = f"<!-- released engines: {name} -->", f"<!-- released engines: end of {name} -->"
    page = PAGE.read_text(encoding="utf-8")
    before, mark, rest = page.partition(begin)
    after = rest.partition(end)[2] if mark else ""
    if not mark:
        raise SystemExit(f"{PAGE}: no mark {begin}")
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
