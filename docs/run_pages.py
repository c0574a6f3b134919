"""Commands of the pages, run: python docs/run_pages.py [--write] [PAGE …]

Each page has a folder of its own with a copy of `examples/`. From top to bottom its `sh` blocks are run line by line
and blocks whose title is a file name are saved; then its `python` blocks run, in one process. A ```text block right
behind one of them is its output. `--write` puts the real output there, except where a line `…` leaves something out;
pages in Chinese get the blocks of the page in English.

Titles: `not run: REASON` leaves a block out, `exit code N` says how its last command ends.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from page_blocks import ROOT, TRANSLATED, Block, blocks, pages
from page_outputs import ANY, difference
from warm_fxquant import PYTHON, warm_folder

LINKED = ("fxquant", "benchmarks", "tests", "pyproject.toml")
"""What commands name besides `examples/`."""
HERE = "/path/to"
"""What stands on a page for the folder that the commands run in."""
SEPARATOR = "\x1e"
COLUMNS = "100"
"""What fits a page of the site; the READMEs show tables as wide as they are."""


@dataclass(frozen=True)
class Ran:
    """A block and what it printed; `failure` is empty, or says what was wrong."""

    block: Block
    printed: str
    failure: str = ""


class Session:
    """A page being run in `folder`, which is made; `kept` as of `warm_folder`."""

    def __init__(self, page: Path, folder: Path, kept: Path | None = None) -> None:
        self.blocks = blocks(page)
        self.folder = folder
        shutil.copytree(ROOT / "examples", folder / "examples")
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        scripts = str(Path(sys.executable).parent)
        self.warm = warm_folder(kept)
        self.environment = {**os.environ, "PATH": f"{self.warm}:{scripts}:{os.environ['PATH']}"}
        self.environment.pop("COLUMNS", None)
        if page.parent != ROOT:
            self.environment["COLUMNS"] = COLUMNS

    def run(self) -> Iterator[Ran]:
        """Every block that runs, in order."""
        for block in self.blocks:
            if block.file_name:
                self._save(block)
            elif block.language == "sh" and not block.why_not_run:
                yield self._shell(block)
            elif block.language == "sh":
                yield from self._after_installing(block)
        yield from self._python()

    def _save(self, block: Block) -> None:
        path = self.folder / block.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")

    def _shell(self, block: Block) -> Ran:
        printed = ""
        for index, command in enumerate(block.commands):
            code = block.exit_code if index == len(block.commands) - 1 else 0
            done = self._call(["bash", "-o", "pipefail", "-c", command])
            printed += done.stdout + (_error(done.stderr) if code else "")
            if done.returncode != code:
                told = f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
                return Ran(block, printed, f"{command}\nexit code {done.returncode}, not {code}\n{told}")
        return Ran(block, printed)

    def _after_installing(self, block: Block) -> Iterator[Ran]:
        """Of a block that installs first, the part that uses what it installed: the page goes on from there."""
        parts = [part for command in block.commands for part in command.split(" && ") if part.startswith("fxquant ")]
        for part in parts if not block.title else []:
            done = self._call(["bash", "-c", part])
            yield Ran(block, done.stdout, done.stderr if done.returncode else "")

    def _python(self) -> Iterator[Ran]:
        code = [
            block for block in self.blocks if block.language == "python" and not (block.file_name or block.why_not_run)
        ]
        if not code:
            return
        texts = [f"\n{'#' * 79}\n{block.text}\nprint({SEPARATOR!r}, flush=True)\n" for block in code]
        done = self._call([str(self.warm / PYTHON)], "".join(texts))
        for index, (block, printed) in enumerate(zip(code, done.stdout.split(f"{SEPARATOR}\n"), strict=False)):
            failed = done.returncode and index == done.stdout.count(SEPARATOR)
            yield Ran(block, printed, done.stderr[-4000:] if failed else "")

    def _call(self, arguments: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            arguments,
            input=text or "",
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        done.stdout, done.stderr = (text.replace(str(self.folder), HERE) for text in (done.stdout, done.stderr))
        return done


def _error(text: str) -> str:
    """What stands in the frame of an error, without the progress before it."""
    return text[text.find("\u2500 error ") :] if "\u2500 error " in text else text


def output_of(block: Block, every: list[Block]) -> Block | None:
    """The ```text block that stands right behind."""
    at = every.index(block) + 1
    return every[at] if at < len(every) and every[at].language == "text" and every[at].follows else None


def failures(page: Path, folder: Path, kept: Path | None = None) -> list[str]:
    """What is wrong on a page: commands that fail, and output that is another."""
    session = Session(page, folder, kept)
    wrong = []
    for ran in session.run():
        shown = output_of(ran.block, session.blocks)
        other = difference(shown.text, ran.printed) if shown and not ran.failure else ""
        if ran.failure or other:
            wrong.append(f"{ran.block.place}: {ran.failure or other}")
    return wrong


def write(page: Path, folder: Path) -> None:
    """Put the real output into the page."""
    session = Session(page, folder)
    lines = page.read_text(encoding="utf-8").splitlines()
    every = list(session.run())
    printed = {output_of(ran.block, session.blocks): ran for ran in every}
    for shown in reversed(session.blocks):
        if shown in printed and ANY not in shown.text.splitlines():
            start = shown.line - 1
            lines[start : start + len(shown.text.splitlines())] = printed[shown].printed.rstrip().splitlines()
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for ran in every:
        shown = output_of(ran.block, session.blocks)
        kept = shown is not None and ANY in shown.text.splitlines()
        wrong = ran.failure or (difference(shown.text, ran.printed) if shown and kept else "")
        if wrong:
            print(f"{ran.block.place}: {wrong}")


def translate(page: Path, english: Path) -> None:
    """Put the blocks of the page in English into its translation, one for one."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for old, new in reversed(list(zip(blocks(page), blocks(english), strict=True))):
        start = old.line - 1
        lines[start : start + len(old.text.splitlines())] = new.text.splitlines()
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Run or write the pages that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    wrong = False
    for page in [path.resolve() for path in given.page] or pages():
        english = TRANSLATED.get(str(page.relative_to(ROOT)))
        if english:
            translate(page, ROOT / english) if given.write else None
            continue
        with tempfile.TemporaryDirectory() as folder:
            if given.write:
                write(page, Path(folder))
            faults = [] if given.write else failures(page, Path(folder))
            print(f"{page.relative_to(ROOT)}: {len(faults)} wrong", *faults, sep="\n")
            wrong = wrong or bool(faults)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
