"""Equal outputs of two commits, all policies × targets on the example: python benchmarks/same_bytes.py BEFORE [AFTER]

Both commits are taken out of git to the same place, one after the other, so that no path tells them apart. Each
compiles in a process of its own, without verification. Files are compared by digest; those that differ are named.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
COMPILE = """
import contextlib, hashlib, io, json, sys
from pathlib import Path
from fxquant.__main__ import run
digests = {}
for policy, target in json.loads(sys.argv[1]):
    out = Path("outputs", f"{policy}-{target}")
    sys.argv[1:] = ["compile", "examples/tiny_deepseek_v3", "-p", policy, "-t", target, "-o", str(out)]
    sys.argv += ["--quiet", "--no-verify", "--no-export"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        run()
    files = sorted(path for path in out.rglob("*") if path.is_file()) if out.exists() else []
    key = f"{policy} {target}"
    digests[key] = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
print(json.dumps(digests))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", nargs="?", default="HEAD", help="another; HEAD where none is given")
    parser.add_argument("--policy", action="append", help="default: every shipped policy of the later commit")
    parser.add_argument("--target", action="append", help="default: every target")
    options = parser.parse_args()
    policies = options.policy or sorted(path.stem for path in (ROOT / "fxquant/policy/shipped").glob("*.yaml"))
    targets = options.target or ["ascend", "mindie", "mindie-2.1rc1", "vllm-ascend", "sglang-npu", "onnx"]
    pairs = [(policy, target) for policy in policies for target in targets]
    before, after = (outputs(commit, pairs) for commit in (options.before, options.after))
    sys.exit(report(before, after))


def outputs(commit: str, pairs: list[tuple[str, str]]) -> dict[str, dict[str, str]]:
    """`policy target` → file → SHA-256 of every output of `commit`; no files where the target refuses the policy."""
    place = Path(tempfile.gettempdir(), "fxquant-same-bytes")
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch, "archive.tar")
        subprocess.run(["git", "-C", str(ROOT), "archive", "-o", str(archive), commit], check=True)
        place.mkdir()  # an error where another run works there
        try:
            subprocess.run(["tar", "xf", str(archive), "-C", str(place)], check=True)
            command = [sys.executable, "-c", COMPILE, json.dumps(pairs)]
            printed = subprocess.run(command, cwd=place, check=True, stdout=subprocess.PIPE, text=True).stdout
        finally:
            subprocess.run(["rm", "-rf", str(place)], check=True)
    digests: dict[str, dict[str, str]] = json.loads(printed.splitlines()[-1])
    return digests


def report(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> int:
    """Print a table; the exit code is 1 if any weight file differs, or was written by one commit only."""
    table = Table("policy", "target", "weight files", "equal", "other files", "equal", "what differs")
    wrong = 0
    for key, old in before.items():
        new = after[key]
        if not old and not new:
            table.add_row(*key.split(), "refused by both")
            continue
        names = sorted(old.keys() | new.keys())
        weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
        others = [name for name in names if name not in weights]
        differs = [name for name in names if old.get(name) != new.get(name)]
        equal = set(names).difference(differs)
        wrong += not equal.issuperset(weights)
        counts = (len(weights), len(equal.intersection(weights)), len(others), len(equal.intersection(others)))
        table.add_row(*key.split(), *map(str, counts), ", ".join(differs))
    Console(width=200).print(table)
    print(f"{len(before)} outputs, {wrong} with other weights")
    return int(bool(wrong))


if __name__ == "__main__":
    main()
