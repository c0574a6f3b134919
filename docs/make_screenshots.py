"""Pictures of the site: python docs/make_screenshots.py, with the extras `docs` and `plot`, and Chromium.

Builds the site strictly, serves it here and takes docs/images/site_home.png and site_tutorial.png, 1280×1600.
"""

import argparse
import subprocess
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from make_diagrams import QUIET
from page_blocks import ROOT
from PIL import Image
from site_hooks import IMAGES

COLOURS = 96
PICTURES = {"site_home.png": "", "site_tutorial.png": "tutorials/ascend/"}


def main() -> None:
    """Build, open, and save what is seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", default="chromium")
    browser = parser.parse_args().browser
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        subprocess.run(["mkdocs", "build", "--strict", "--quiet", "-d", site], cwd=ROOT, check=True)
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
        Thread(target=server.serve_forever, daemon=True).start()
        for name, page in PICTURES.items():
            arguments = [browser, *QUIET, f"--user-data-dir={folder}/profile", "--window-size=1280,1600"]
            arguments += ["--hide-scrollbars", "--virtual-time-budget=5000", f"--screenshot={IMAGES / name}"]
            address = f"http://127.0.0.1:{server.server_port}/{page}"
            subprocess.run([*arguments, address], check=True, capture_output=True)
            Image.open(IMAGES / name).convert("RGB").quantize(COLOURS).save(IMAGES / name, optimize=True)
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and prints nothing."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


if __name__ == "__main__":
    main()
