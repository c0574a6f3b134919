"""The tools of the pages, docs/*.py, can be imported in these tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
