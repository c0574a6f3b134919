"""Blocks of a page: its fenced code, with language, title and section, and the commands that stand in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*) *(?P<options>.*)$")
TITLE = re.compile(r'title="(?P<title>[^"]*)"')
NOT_RUN = "not run: "
EXIT_CODE = "exit code "
INSTALLS = {
    ("README.md", "Quick start"),
    ("README.md", "Tests"),
    ("README.zh.md", "快速开始"),
    ("README.zh.md", "测试"),
}
"""Sections whose block makes an environment and installs into it: .ci/run runs them."""
TRANSLATED = {
    "README.zh.md": "README.md",
    "docs/zh/ascend.md": "docs/tutorials/ascend.md",
    "docs/zh/onnx.md": "docs/tutorials/onnx.md",
}
"""Pages whose blocks are those of a page in English, where they are run."""
BY_GATE = "installs packages: .ci/run runs it"


@dataclass(frozen=True)
class Block:
    """Fenced code. `line` is that of its first line of text, from 1; `follows`: nothing but space is before it."""

    page: Path
    line: int
    language: str
    title: str
    section: str
    text: str
    follows: bool

    @property
    def place(self) -> str:
        """`docs/policies.md:12`."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def why_not_run(self) -> str:
        """The reason in its title, empty for a block that is run."""
        if (str(self.page.relative_to(ROOT)), self.section) in INSTALLS:
            return BY_GATE
        return self.title.removeprefix(NOT_RUN) if self.title.startswith(NOT_RUN) else ""

    @property
    def exit_code(self) -> int:
        """What its last command ends with: 0, unless the title says otherwise."""
        return int(self.title.removeprefix(EXIT_CODE)) if self.title.startswith(EXIT_CODE) else 0

    @property
    def file_name(self) -> str:
        """The file that it is to be saved as, empty for none."""
        named = self.language != "sh" and "." in self.title and " " not in self.title
        return self.title if named else ""

    @property
    def commands(self) -> list[str]:
        """Lines of an `sh` block: continued ones joined, without comments."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def pages() -> list[Path]:
    """Every page of the site, and the READMEs."""
    return sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path) -> list[Block]:
    """The fenced code of a page, from top to bottom."""
    result: list[Block] = []
    section, opened, between = "", None, "text"
    text: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, start, text = fence, number + 1, []
        elif opened is not None and line.strip() == "```":
            title = TITLE.search(opened["options"])
            shown = "".join(f"{content}\n" for content in text)
            follows = not between.strip()
            result.append(
                Block(page, start, opened["language"], title["title"] if title else "", section, shown, follows)
            )
            opened, between = None, ""
        elif opened is not None:
            text.append(line.removeprefix(opened["indent"]))
        else:
            between += line
            section = line.removeprefix("## ") if line.startswith("## ") else section
    return result


def fxquant_arguments(command: str) -> list[list[str]]:
    """The words behind each `fxquant` of a shell line: of every part between `&&`, `|` and `;`."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;()<>"):
            parts.append([])
        else:
            parts[-1].append(word)
    calls = []
    for part in parts:
        words = [word for word in part if not re.fullmatch(r"[A-Z_]+=.*|\$", word)]
        if words[:1] == ["fxquant"]:
            calls.append(words[1:])
        elif words[:3] == ["python", "-m", "fxquant"]:
            calls.append(words[3:])
    return calls
