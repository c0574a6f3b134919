"""Write docs/verbs/*.md, a page per verb, from the command line itself: python docs/make_verb_pages.py

Usage, arguments and options come from the commands; examples are the commands of that verb in the tutorials, which are
run there.
"""

import re
from typing import Any

import typer
from page_blocks import ROOT, blocks, fxquant_arguments

from fxquant.tools.main import app

FOLDER = ROOT / "docs" / "verbs"
TUTORIALS = ("ascend", "onnx", "policy")
EXAMPLES = 4
DEFAULT = re.compile(r"\s*\[dim\]default: (.*)\[/\]$")


def main() -> None:
    """Write every page."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in verb_pages().items():
        (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")


def verb_pages() -> dict[str, str]:
    """Verb → its page."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("fxquant", [], resilient_parsing=True)
    return {name: _page(name, command, context) for name, command in group.commands.items()}


def _page(name: str, command: Any, parent: Any) -> str:
    context = command.context_class(command, info_name=name, parent=parent)
    usage = " ".join(["fxquant", name, *command.collect_usage_pieces(context)]).replace("{", "").replace("}", "")
    arguments = [entry for entry in command.get_params(context) if entry.param_type_name == "argument"]
    options = [entry for entry in command.get_params(context) if entry.param_type_name == "option"]
    parts = [
        f"# fxquant {name}\n\n{_paragraphs(command.help)}",
        f"```text\n{usage}\n```",
    ]
    if arguments:
        rows = [f"| `{entry.metavar}` | {_text(entry.help)} | {_default(entry)} |" for entry in arguments]
        parts.append("\n".join(["## Arguments\n", "| argument | meaning | default |", "|---|---|---|", *rows]))
    rows = [
        f"| {_names(entry)} | {_text(entry.help)}{' Repeatable.' if entry.multiple else ''} | {_default(entry)} |"
        for entry in options
    ]
    parts.append("\n".join(["## Options\n", "| option | meaning | default |", "|---|---|---|", *rows]))
    parts += _examples(name)
    parts.append("Exit codes, environment variables and what `--json` prints: [the command line](../command-line.md).")
    return "\n\n".join(["<!-- Made by docs/make_verb_pages.py: do not edit. -->", *parts]) + "\n"


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _text(text: str | None) -> str:
    return DEFAULT.sub("", text or "").replace("|", "\\|")


def _meaning(option: Any) -> str:
    return _text(option.help) + (" Repeatable." if option.multiple else "")


def _names(option: Any) -> str:
    if option.name == "help":
        return "`-h`, `--help`"
    value = "" if option.is_flag else f" {option.metavar}"
    longest_last = sorted(option.opts, key=len)
    return ", ".join(f"`{name}{value}`" for name in [*longest_last, *option.secondary_opts])


def _default(parameter: Any) -> str:
    stated = DEFAULT.search(parameter.help or "")
    if stated:
        return f"`{stated[1]}`" if "<" in stated[1] else stated[1]
    if parameter.required:
        return "required"
    if parameter.param_type_name == "option" and parameter.is_flag:
        return f"`{parameter.opts[0]}`" if parameter.default and parameter.secondary_opts else ""
    value = parameter.default() if callable(parameter.default) else parameter.default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else f"`{value}`"


def _examples(verb: str) -> list[str]:
    examples = []
    for tutorial in TUTORIALS:
        page = ROOT / "docs" / "tutorials" / f"{tutorial}.md"
        title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        run = [block for block in blocks(page) if block.language == "sh" and not block.why_not_run]
        runs = [command for block in run for command in _shown(block.text)]
        calls = [command for command in runs if any(words[:1] == [verb] for words in fxquant_arguments(command))][
            :EXAMPLES
        ]
        if calls:
            code = "\n".join(['```sh title="not run: run there"', *calls, "```"])
            examples.append(f"From [{title}](../tutorials/{tutorial}.md):\n\n{code}")
    return ["## Examples", *examples] if examples else []


def _shown(text: str) -> list[str]:
    """Commands as they stand on the page, continued lines and all."""
    return [command for command in re.findall(r"(?:.*\\\n)*.+", text) if not command.startswith("#")]


if __name__ == "__main__":
    main()
