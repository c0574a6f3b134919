"""Releases of transformers: `python tests/frontend/transformers_range.py [--write] [RELEASE …]`.

Installs each release in a folder of its own, once a machine, and there takes the hash of the shipped example and the
SHA-256 of the weight files that it is compiled to: as a checkpoint folder, and as transformers' model of it. Prints
markdown; --write puts it into docs/model-file.md, between its marks. Without a release those of `RELEASES` and the
newest one.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from places import EXAMPLE, MODEL_FILES, ROOT
from released import installed, newest

RELEASES = ("4.51.3", "4.53.3", "4.57.6", "5.0.0", "5.5.4", "5.12.1", "5.13.1")
FOLDER = (str(EXAMPLE),)
MODEL = (str(MODEL_FILES / "hugging_face.py"), "--checkpoint", str(EXAMPLE))
POLICY = "deepseek_w4a8_dynamic"
Row = tuple[str, tuple[str, str], tuple[str, str]]
"""Release, then graph and weights of the folder and of the model file."""
PAGE = ROOT / "docs" / "model-file.md"
BEGIN, END = "<!-- releases of transformers -->", "<!-- end of releases -->"


def main() -> int:
    """1 where a release gives another graph, or none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("releases", nargs="*")
    options = parser.parse_args()
    releases = options.releases or [*RELEASES, newest("transformers")]
    rows = []  # type: list[Row]
    for release in releases:
        path = os.pathsep.join((str(installed("transformers", release)), str(ROOT)))
        environment = os.environ | {"PYTHONPATH": path}
        rows.append((release, *(results(given, environment) for given in (FOLDER, MODEL))))
    text = table(rows)
    if options.write:
        _write(text)
    print(text)
    return 0 if all(folder == model for _, folder, model in rows) else 1


def results(given: tuple[str, ...], environment: dict[str, str]) -> tuple[str, str]:
    """The hash of a model's graph and the digest of its weight files; where one fails, what it says."""
    code, shown = _fxquant(environment, "show", *given, "--hash")
    with tempfile.TemporaryDirectory() as folder:
        compile_ = ("compile", *given, "--policy", POLICY, "-o", f"{folder}/out", "-q")
        failed, said = _fxquant(environment, *compile_)
        weights = hashlib.sha256()
        for file in sorted(Path(folder).rglob("*.safetensors")):
            weights.update(file.read_bytes())
        return shown.split("\n")[-1] if not code else shown, said if failed else weights.hexdigest()


def _fxquant(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "fxquant", *arguments]
    run = subprocess.run(command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True)
    lines = (run.stderr if run.returncode else run.stdout).split("\n")
    return run.returncode, "\n".join(line.strip() for line in lines if line.strip())


def table(rows: "list[Row]") -> str:
    """A row for each release."""
    lines = [
        "| transformers | graph of the folder | of `hugging_face.py` | weights of the folder | of `hugging_face.py` |"
    ]
    lines += ["|---|---|---|---|---|"]
    for release, folder, model in rows:
        pairs = zip(folder, model, strict=True)
        cells = [f"`{own[:12]}…` | {'the same' if theirs == own else theirs}" for own, theirs in pairs]
        lines.append(f"| {release} | {' | '.join(cells)} |".replace("\n", " "))
    return "\n".join(lines)


def _write(text: str) -> None:
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    if not mark:
        raise SystemExit(f"{PAGE}: no mark {BEGIN}")
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
