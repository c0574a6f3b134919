"""Mermaid diagrams of the site: mkdocs puts the picture that docs/make_diagrams.py drew in the place of each.

So a page that is viewed loads no script for them, and building needs no network.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
IMAGES = Path(__file__).parent / "images"


def picture(diagram: str) -> Path:
    """The file that a diagram is drawn to: its name changes with the text."""
    return IMAGES / f"diagram_{hashlib.sha256(diagram.encode()).hexdigest()[:12]}.svg"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs: the text of a page before it is rendered."""
    up = "../" * page.file.src_uri.count("/")

    def drawn(match: re.Match[str]) -> str:
        path = picture(match[1])
        if not path.is_file():
            raise FileNotFoundError(f"{page.file.src_uri}: a diagram changed. Draw it: python docs/make_diagrams.py")
        return f"![diagram]({up}images/{path.name}){{ .diagram }}"

    return MERMAID.sub(drawn, markdown)
