"""Every file of an output damaged in every way, with and without the manifest: python benchmarks/corruption.py --jobs 2

Prints a table: how many damages of each file `verify` names, or lists as not looked at.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import torch
from damaged_files import (
    DAMAGES,
    HANG,
    MISSED,
    NAMED,
    OUTPUTS,
    TRACEBACK,
    UNREAD,
    Made,
    expected,
    make_output,
    make_source,
    outcome,
)
from remembered import traced_once

KINDS = (NAMED, UNREAD, MISSED, TRACEBACK, HANG)
SHARED_MEMORY = Path("/dev/shm")
Trial = tuple[Made, str, str, bool]
Row = dict[str, str]


def main() -> int:
    """0 where no damage was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", action="append", default=[], choices=OUTPUTS)
    parser.add_argument("--damage", action="append", default=[], choices=DAMAGES)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = Path(tempfile.mkdtemp(prefix="fxquant-damage-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    try:
        source = make_source(base)
        outputs = [make_output(name, source) for name in options.output or OUTPUTS]
        with traced_once():
            for output in outputs[:1]:  # what it imports and compiles, every child has
                outcome(output, "config.json", "one byte more", False, base / "warm")
            rows = run_trials(trials(outputs, options.damage or list(DAMAGES)), base, options.jobs)
    finally:
        shutil.rmtree(base)
    wrong = [row for row in rows if row["kind"] not in expected(row["file"], row["manifest"] == "with")]
    for row in wrong:
        print("{output}, {file}: {damage}, {manifest} the manifest: {kind}: {fact}".format(**row), file=sys.stderr)
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return 1 if wrong else 0


def trials(outputs: list[Made], damages: list[str]) -> list[Trial]:
    """Every file, damage, and presence of the manifest."""
    return [
        (output, file, damage, manifest)
        for output in outputs
        for file in output.files()
        for damage in damages
        for manifest in (True, False)
        if manifest or file != "fxquant_manifest.json"
    ]


def run_trials(selected: list[Trial], base: Path, jobs: int) -> list[Row]:
    """All of them, dealt out to `jobs` processes."""
    files, children = [base / f"rows-{part}.jsonl" for part in range(jobs)], []
    for part, file in enumerate(files):
        child = os.fork()
        if child == 0:
            _worker(selected[part::jobs], file, base)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def _worker(selected: list[Trial], file: Path, base: Path) -> None:
    status = 1
    try:
        with file.open("w") as stream:
            for output, name, damage, manifest in selected:
                kind, fact = outcome(output, name, damage, manifest, base / f"trial-{os.getpid()}")
                with_ = "with" if manifest else "without"
                row = {
                    "output": output.name,
                    "file": name,
                    "damage": damage,
                    "manifest": with_,
                    "kind": kind,
                    "fact": fact,
                }
                stream.write(json.dumps(row) + "\n")
                stream.flush()
        status = 0
    finally:
        os._exit(status)


def table(rows: list[Row]) -> str:
    """Markdown: a line a file, over all outputs that have it."""
    groups: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        groups[row["file"], row["manifest"]][row["kind"]] += 1
        groups["**all**", row["manifest"]][row["kind"]] += 1
    lines = ["| file | manifest | damages | " + " | ".join(KINDS) + " |", "|---" * (3 + len(KINDS)) + "|"]
    for (file, manifest), counts in sorted(groups.items(), key=lambda group: (group[0][0].startswith("*"), group[0])):
        cells = [file, manifest, str(counts.total()), *(str(counts[kind]) for kind in KINDS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
