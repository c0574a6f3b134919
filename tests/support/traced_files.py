"""Traces for files whose tests compile a model.py again and again: import the fixture `files_traced_once`."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from remembered import remembering

from fxquant.frontend import source


@pytest.fixture(scope="module", autouse=True)
def files_traced_once() -> Iterator[None]:
    """A model.py of one text is traced once for each checkpoint and PYTHONPATH; what is refused is, each time."""

    def key(file: Path, *arguments: Any) -> tuple[Any, ...]:
        return file, file.read_bytes(), *arguments, os.environ.get("PYTHONPATH")

    with patch.object(source, "trace_in_child", remembering(source.trace_in_child, key)):
        yield
