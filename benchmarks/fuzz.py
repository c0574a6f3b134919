"""Damaged and hostile files, a million of them: python benchmarks/fuzz.py --cases 1000000 --jobs 2

Prints a table, and saves what ended in a traceback, hung, took too much memory or did what it must not: one file each,
for --replay FILE.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import torch
from fuzzing.campaign import SHARED_MEMORY, Campaign, table
from fuzzing.guard import Guard, limit_memory
from fuzzing.seeds import write_seeds
from fuzzing.targets import TARGETS, targets
from fuzzing.worker import judge, load_finding


def main() -> int:
    """0 where every case ended in success or in an FxquantError."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", action="append", default=[], choices=[target.name for target in TARGETS])
    parser.add_argument("--findings", type=Path, default=Path("out/fuzz"), help="Folder for what is found.")
    parser.add_argument("--replay", type=Path, help="A saved finding, done once more.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    base = Path(tempfile.mkdtemp(prefix="fxquant-fuzz-", dir=parent))
    try:
        write_seeds(base / "seeds")
        return _replay(base, options.replay) if options.replay else _campaign(base, options)
    finally:
        shutil.rmtree(base)


def _replay(base: Path, path: Path) -> int:
    finding, data = load_finding(path)
    (target,) = targets([finding.target])
    folder, guard = base / "seeds" / target.seed, Guard(base)
    target.read(folder)
    (folder / finding.file).write_bytes(data)
    os.chdir(base)
    guard.install()
    limit_memory()
    print(f"{finding.kind}: {finding.fact}\n{finding.where}\nnow:", *judge(target, folder, guard), sep="\n")
    try:
        target.read(folder)
    except BaseException:
        import traceback

        traceback.print_exc()
    return 0


def _campaign(base: Path, options: argparse.Namespace) -> int:
    campaign = Campaign(base, targets(options.target), options.cases, options.jobs, options.seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    campaign.run()
    if campaign.stopped:
        print("stopped: the table has what was done", file=sys.stderr)
    findings = [finding for row in campaign.rows.values() for finding in row.findings]
    for finding in findings:
        path = finding.save(options.findings)
        print(f"{path}: {finding.kind}: {finding.fact:.200}\n    {finding.where}", file=sys.stderr)
    if options.json:
        names = {
            name: {**row.counts, "memory": row.memory, "seconds": row.seconds} for name, row in campaign.rows.items()
        }
        print(json.dumps(names, indent=2))
    else:
        print(table(campaign.rows))
    return 1 if findings or campaign.stopped else 0


if __name__ == "__main__":
    sys.exit(main())
