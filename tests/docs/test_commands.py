"""Every command of every page and of both READMEs is run, or says why not and is one that fxquant takes."""

import re
import time
from pathlib import Path

import pytest
import typer
from kept import Kept
from page_blocks import BY_GATE, ROOT, TRANSLATED, Block, blocks, fxquant_arguments, pages
from run_pages import failures

from fxquant.tools.main import app

REASONS = {
    "a model file": "of transformers; test_ways_in.py has it",
    "a part of a model file": "tests/model_files has the whole",
    "a pattern": "OUT, MODEL and FILE stand for the reader's own",
    "a sketch": "of a pass",
    "changes the start-up file of your shell": "completion",
    "downloads engines; pytest -m engines runs it": "",
    "downloads a task": "of lm-evaluation-harness",
    "downloads packages, takes minutes": "of readers of ONNX models; pytest -m engines runs them",
    "installs packages": "into the environment that runs the tests",
    "installs packages: .ci/run runs it": "the README's two blocks",
    "installs eight releases": "of transformers",
    "it has to be killed first": "test_resume.py kills and resumes",
    "takes half an hour": "the study of mutations",
    "needs a GPU": "",
    "needs onnxruntime-genai": "pytest -m engines installs and runs it",
    "needs an NPU": "",
    "needs an output of the reference quantizer": "",
    "needs several machines": "test_ray.py runs a cluster on one",
    "needs the 671B checkpoint": "",
    "run there": "on the page that the line before names",
    "the README runs it": "",
    "takes hours": "",
    "takes minutes": "",
    "test_ray.py runs it": "",
    "test_targets.py runs it": "",
    "test_ways_in.py runs it": "",
}
ALL = [block for page in pages() for block in blocks(page)]
SHELL = [block for block in ALL if block.language == "sh"]
LEFT_OUT = [block for block in ALL if block.why_not_run]
NAMES = [str(page.relative_to(ROOT)) for page in pages()]
STARTED = [block for block in ALL if block.language in ("sh", "python") and block.why_not_run in ("", BY_GATE)]
RUN = sorted({str(block.page.relative_to(ROOT)) for block in STARTED} - set(TRANSLATED))


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_every_command_of_the_page_succeeds_and_prints_what_stands_there(page: str, tmp_path: Path, kept: Kept) -> None:
    started = time.perf_counter()
    wrong = failures(ROOT / page, tmp_path / "page", kept.folder)
    print(f"{page}: {time.perf_counter() - started:.1f} s")
    assert not wrong, "\n\n".join(wrong)


def test_what_is_not_run_has_a_known_reason() -> None:
    for block in LEFT_OUT:
        print(f"{block.place}: {block.why_not_run}: {block.text.splitlines()[0]}")
    assert {block.why_not_run for block in LEFT_OUT} <= set(REASONS), "a new reason: is it one?"


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_the_command_line_takes_every_command(block: Block) -> None:
    for command in block.commands:
        for words in fxquant_arguments(command):
            assert parsed(words), f"{block.place}: {command}"


@pytest.mark.parametrize("page", NAMES)
def test_the_command_line_takes_what_stands_in_the_text(page: str) -> None:
    for code in re.findall(r"(?<!`)`(fxquant [^`\n]+)`(?!`)", without_fences(page)):
        for words in fxquant_arguments(code.replace("\\|", "|")):
            assert parsed(words, partly=True), f"{page}: {code}"


@pytest.mark.parametrize("page", NAMES)
def test_no_command_stands_outside_of_a_fence(page: str) -> None:
    assert not re.findall(r"^    (?:\$ )?(?:fxquant|python3?|pip) .*$", without_fences(page), re.MULTILINE)


@pytest.mark.parametrize("page", TRANSLATED)
def test_a_translated_page_has_the_blocks_of_the_english_one(page: str) -> None:
    assert code_of(page) == code_of(TRANSLATED[page])


def code_of(page: str) -> list[tuple[str, str]]:
    """Language and text of each block, docstrings and comments aside, which are translated."""
    return [(block.language, block.text) for block in blocks(ROOT / page)]


def without_fences(page: str) -> str:
    """The text of a page without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def parsed(words: list[str], partly: bool = False) -> bool:
    """Whether the command line takes these words. `partly`: what is required may be missing, as in `fxquant show`."""
    if not words or words[0].isupper():
        return True
    group = typer.main.get_command(app)
    if words[0].startswith("-"):  # of fxquant itself; some of them act as soon as they are parsed
        return words[0] in [option for parameter in group.params for option in parameter.opts]
    context = group.make_context("fxquant", [], resilient_parsing=True)
    try:
        name, command, rest = group.resolve_command(context, words)
        assert name and command
        command.make_context(name, rest, parent=context, resilient_parsing=partly)
    except typer.Exit as done:
        return done.exit_code == 0
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        print(error.format_message())
        return False
    return True
