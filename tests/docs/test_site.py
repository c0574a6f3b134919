"""What `mkdocs build --strict` would say, as far as it can be known without mkdocs; and links that it does not see."""

import pkgutil
import re
from pathlib import Path

import pytest
import yaml
from page_blocks import ROOT
from site_hooks import IMAGES, MERMAID, on_page_markdown, picture

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OUTSIDE = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "README.md"]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def in_nav(entries: object) -> list[str]:
    """Paths of a part of `nav`."""
    if isinstance(entries, dict):
        return [path for value in entries.values() for path in in_nav(value)]
    if isinstance(entries, list):
        return [path for value in entries for path in in_nav(value)]
    return [str(entries)]


def test_every_page_has_its_place_in_the_navigation_once() -> None:
    nav = in_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == [str(page.relative_to(DOCS)) for page in PAGES]


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    missing = [link for link in LINK.findall(text) if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_name_of_the_python_reference_is_there_with_a_docstring() -> None:
    names = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert names
    assert not [name for name in names if not pkgutil.resolve_name(name).__doc__]


def test_every_diagram_is_drawn_and_no_picture_is_left_over() -> None:
    sources = [source for page in PAGES for source in MERMAID.findall(page.read_text(encoding="utf-8"))]
    assert sources
    assert {picture(diagram) for diagram in sources} == set(IMAGES.glob("diagram_*.svg")), (
        "run: python docs/make_diagrams.py"
    )


def test_a_diagram_that_is_not_drawn_ends_the_build() -> None:
    class Page:
        """Of mkdocs, as far as the hook looks at it."""

        class file:  # noqa: N801
            src_uri = "zh/page.md"

    drawn = MERMAID.findall((DOCS / "architecture.md").read_text(encoding="utf-8"))[0]
    assert "](../images/diagram_" in on_page_markdown(f"a\n```mermaid\n{drawn}```\nb\n", Page())
    with pytest.raises(FileNotFoundError, match="make_diagrams"):
        on_page_markdown("```mermaid\nflowchart TD\n    other --> one\n```\n", Page())


def test_no_picture_loads_anything_from_elsewhere() -> None:
    for path in IMAGES.glob("*.svg"):
        assert not re.findall(r"(?:url\(|href=)[\"']?https?:", path.read_text(encoding="utf-8")), path.name
