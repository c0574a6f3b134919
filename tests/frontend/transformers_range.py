"""Releases of transformers: `python tests/frontend/transformers_range.py [--write] [RELEASE …]`.

Installs each release in a folder of its own, once a machine, and there takes the hashes of the shipped example: as a
checkpoint folder, and as transformers' model of it. Prints markdown; --write puts it into docs/model-file.md, between
its marks. Without a release those of `RELEASES` and the newest one.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from places import EXAMPLE, MODEL_FILES, ROOT
from released import installed, newest

RELEASES = ("4.51.3", "4.53.3", "4.57.6", "5.0.0", "5.5.4", "5.12.1", "5.13.1")
PAGE = ROOT / "docs" / "model-file.md"
BEGIN, END = "<!-- releases of transformers -->", "<!-- end of releases -->"


def main() -> int:
    """1 where a release gives another graph, or none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("releases", nargs="*")
    options = parser.parse_args()
    releases = options.releases or [*RELEASES, newest("transformers")]
    rows = [(release, *hashes(release)) for release in releases]
    text = table(rows)
    if options.write:
        _write(text)
    print(text)
    return 0 if all(folder == model for _, folder, model in rows) else 1


def hashes(release: str) -> tuple[str, str]:
    """Of the folder and of the model file under `release`; what it says on its last line where it fails."""
    path = os.pathsep.join((str(installed("transformers", release)), str(ROOT)))
    environment = os.environ | {"PYTHONPATH": path}
    given = (str(EXAMPLE),), (str(MODEL_FILES / "hugging_face.py"), "--checkpoint", str(EXAMPLE))
    folder, model = (_hash(arguments, environment) for arguments in given)
    return folder, model


def _hash(arguments: tuple[str, ...], environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "fxquant", "show", *arguments, "--hash"]
    run = subprocess.run(command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True)
    lines = (run.stderr if run.returncode else run.stdout).split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return " ".join(said) if run.returncode else said[-1]


def table(rows: list[tuple[str, str, str]]) -> str:
    """A row for each release."""
    lines = ["| transformers | folder | `hugging_face.py` |", "|---|---|---|"]
    for release, folder, model in rows:
        lines.append(f"| {release} | `{folder[:12]}…` | {'the same' if model == folder else model} |")
    return "\n".join(lines)


def _write(text: str) -> None:
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    if not mark:
        raise SystemExit(f"{PAGE}: no mark {BEGIN}")
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
