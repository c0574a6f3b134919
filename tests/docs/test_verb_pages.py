"""docs/verbs has what docs/make_verb_pages.py writes."""

from make_verb_pages import FOLDER, verb_pages


def test_the_committed_pages_are_current() -> None:
    written = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    assert written == verb_pages(), "run: python docs/make_verb_pages.py"


def test_a_page_has_every_option_of_its_verb() -> None:
    assert "| `-t TARGET`, `--target TARGET` |" in verb_pages()["compile"]
    assert "| `--sensitivity` |" in verb_pages()["eval"]
