"""Draw the mermaid diagrams of the pages as SVG: python docs/make_diagrams.py

Needs npm, which fetches mermaid, and Chromium (--browser NAME if not `chromium`). Draws what has no picture yet and
deletes pictures of diagrams that are gone. Needed only after a diagram was changed: pictures are committed.
"""

import argparse
import html
import json
import re
import subprocess
import tempfile
from pathlib import Path

from page_blocks import pages
from site_hooks import IMAGES, MERMAID, picture

PACKAGE = "@mermaid-js/tiny@11.17.2"
CONFIG = {"startOnLoad": False, "theme": "neutral", "htmlLabels": False, "flowchart": {"htmlLabels": False}}
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
QUIET += ("--disable-background-networking", "--disable-component-update")


def main() -> None:
    """Draw what is missing, delete what is left over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", default="chromium")
    browser = parser.parse_args().browser
    diagrams = [text for page in pages() for text in MERMAID.findall(page.read_text(encoding="utf-8"))]
    with tempfile.TemporaryDirectory() as folder:
        for diagram in (drawing for drawing in diagrams if not picture(drawing).is_file()):
            picture(diagram).write_text(draw(diagram, browser, Path(folder)), encoding="utf-8")
    for stale in set(IMAGES.glob("diagram_*.svg")) - {picture(drawing) for drawing in diagrams}:
        stale.unlink()


def draw(diagram: str, browser: str, folder: Path) -> str:
    """The SVG of one diagram, as mermaid makes it in a browser."""
    script = folder / "package" / "dist" / "mermaid.tiny.js"
    if not script.is_file():
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True)
        subprocess.run(["tar", "xzf", *(archive.name for archive in folder.glob("*.tgz"))], cwd=folder, check=True)
    page = folder / "page.html"
    page.write_text(
        f"<meta charset=utf-8><body></body><script src={script.as_uri()}></script><script>"
        f"mermaid.initialize({json.dumps(CONFIG)});mermaid.render('diagram', {json.dumps(diagram)}).then("
        "r => {document.body.innerHTML = ''; const p = document.createElement('pre'); p.textContent = r.svg; "
        "document.body.append(p)})</script>",
        encoding="utf-8",
    )
    arguments = [browser, *QUIET, f"--user-data-dir={folder}/profile", "--virtual-time-budget=10000", "--dump-dom"]
    dom = subprocess.run([*arguments, page.as_uri()], check=True, capture_output=True, text=True).stdout
    match = re.search(r"<pre>(.*)</pre>", dom, re.DOTALL)
    if match is None:
        raise RuntimeError(f"mermaid drew nothing of:\n{diagram}")
    return html.unescape(match[1]).replace("<br>", "<br/>") + "\n"


if __name__ == "__main__":
    main()
