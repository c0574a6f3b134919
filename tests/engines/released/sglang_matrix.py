"""The matrix of released SGLang: `python tests/engines/released/sglang_matrix.py [--write] [RELEASE …]`.

Prints markdown: release x policy x ranks x parallelism, with the engine's own words. --write puts it into
docs/targets.md, between its marks. Any release may be named; a newer one shows what it does otherwise.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import torch
from outcome import table
from places import ROOT
from sglang_cases import RELEASES, Folders, run
from sglang_runs import outcomes, shown

PAGE = ROOT / "docs" / "targets.md"
BEGIN, END = "<!-- released engines: sglang -->", "<!-- released engines: end of sglang -->"


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=RELEASES)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="fxquant-engines-") as scratch:
        cases = shown(Folders(Path(scratch)))
        for release in options.releases:
            findings = run(release, [one.case for one in cases], Path(scratch) / f"{release}.json")
            rows += outcomes(release, cases, findings)
    text = table(rows)
    if options.write:
        before, mark, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        if not mark:
            raise SystemExit(f"{PAGE}: no mark {BEGIN}")
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
