"""Readers of ONNX models: who loads and runs `model.onnx`, each in a process of its own and with a row of a table."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np
from released import installed, installed_node, newest, newest_node

SUPPORT = Path(__file__).parent
FEEDS, LOGITS = "feeds.json", "logits.bin"
LONGEST = 160
"""Letters of what a reader says that are kept, those at the end."""


class Package(Enum):
    """Where a reader's package comes from: this environment, or downloaded beside it."""

    HERE = "here"
    PYPI = "PyPI"
    NPM = "npm"


@dataclass(frozen=True)
class Reader:
    """title  what the table says; `way` is its function in onnx_reader_process.py or onnx_reader.mjs
    package  its distribution, at `version`; "" is the newest, or what is here
    equal    its logits are onnxruntime's bit for bit: it hands the graph, changed, to onnxruntime
    """

    title: str
    way: str
    package: str
    origin: Package = Package.HERE
    version: str = ""
    equal: bool = False

    @property
    def newest(self) -> "Reader":
        """The same reader without the choice of a version; unchanged if it is the oldest that is supported."""
        return self if self.version == OLDEST else replace(self, version="")


@dataclass(frozen=True)
class Reading:
    """What one reader did with one folder. `logits` is None where it stopped, with `words`."""

    reader: Reader
    version: str
    logits: np.ndarray | None
    words: str = ""


OLDEST = "1.23.0"
"""The oldest onnxruntime that fxquant's packages name."""
ONNXRUNTIME = Reader("ONNX Runtime", "onnxruntime", "onnxruntime")
HERE = [
    Reader("onnx, checker with `full_check`", "checker", "onnx", equal=True),
    Reader("onnx, strict shape inference with data propagation", "shape_inference", "onnx", equal=True),
    Reader("onnx, reference evaluator", "reference_evaluator", "onnx"),
    Reader("onnx, version converter to opset 23", "version_converter", "onnx", equal=True),
    Reader("onnx, inliner", "inliner", "onnx", equal=True),
    Reader("onnx, inliner and version converter to opset 23", "inlined_version_converter", "onnx", equal=True),
    Reader("ONNX Runtime, its optimized model saved and loaded", "saved_again", "onnxruntime", equal=True),
    Reader("ONNX Runtime, a folder of links to blobs", "links", "onnxruntime", equal=True),
]
DOWNLOADED = [
    Reader("ONNX Runtime, oldest supported", "onnxruntime", "onnxruntime", Package.PYPI, OLDEST),
    Reader("onnxslim", "onnxslim", "onnxslim", Package.PYPI, "0.1.98", equal=True),
    Reader("onnxslim, inlined", "inlined_onnxslim", "onnxslim", Package.PYPI, "0.1.98", equal=True),
    Reader("OpenVINO, CPU in float32", "openvino", "openvino", Package.PYPI, "2026.4.1"),
    Reader("OpenVINO, CPU in float32, inlined", "inlined_openvino", "openvino", Package.PYPI, "2026.4.1"),
    Reader("onnxruntime-node", "onnxruntime-node", "onnxruntime-node", Package.NPM, "1.30.0"),
    Reader("onnxruntime-web, wasm", "onnxruntime-web", "onnxruntime-web", Package.NPM, "1.30.0"),
]


def write_feeds(folder: Path, vocabulary: int, widths: list[int]) -> None:
    """`folder/feeds.json`, a prompt of seven tokens in two rows and a step after it; row 1 begins with two pads.

    widths  of the latent caches
    """
    chosen = np.random.default_rng(0)
    steps = []
    for past, new in ((0, 7), (7, 1)):
        mask = np.ones((2, past + new), dtype=np.int64)
        mask[1, :2] = 0
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
        ids = chosen.integers(3, vocabulary, (2, new))
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        steps.append({name: {"dims": array.shape, "data": array.ravel().tolist()} for name, array in arrays.items()})
    (folder / FEEDS).write_text(json.dumps({"steps": steps, "widths": widths}))


def read(reader: Reader, model: Path, scratch: Path) -> Reading:
    """Let `reader` load the folder `model` and run the feeds in `scratch`.

    → logits float32, those of all steps in one dimension.
    """
    result = scratch / LOGITS
    result.unlink(missing_ok=True)
    command, path = _command(reader)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "ORT_DISABLE_TELEMETRY": "1"}
    arguments = [reader.way, str(model), str(scratch)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    said = [line.strip() for line in (done.stderr if done.returncode else done.stdout).splitlines() if line.strip()]
    if done.returncode:
        return Reading(reader, reader.version, None, _shortened(re.sub(r"/\S+/", "", " ".join(said[-1:]))))
    return Reading(reader, said[-1], np.fromfile(result, dtype=np.float32))


def _command(reader: Reader) -> tuple[list[str], list[str]]:
    """The command before its arguments, and what goes before everything on Python's path."""
    path = [str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    if reader.origin is Package.NPM:
        folder = installed_node(reader.package, reader.version or newest_node(reader.package))
        return ["node", str(SUPPORT / "onnx_reader.mjs"), str(folder)], path
    if reader.origin is Package.PYPI:
        path.insert(0, str(installed(reader.package, reader.version or newest(reader.package))))
    return [sys.executable, str(SUPPORT / "onnx_reader_process.py")], path


def _shortened(words: str) -> str:
    return words if len(words) <= LONGEST else f"…{words[-LONGEST:]}"


def table(folders: dict[str, Path], readers: list[Reader], scratch: Path) -> Iterator[str]:
    """Lines of markdown: what each reader does with each folder, beside ONNX Runtime.

    folders  column's title → folder; the feeds for all of them are in `scratch`
    """
    yield f"| reader | version | {' | '.join(folders)} |"
    yield "|---|---|" + "---|" * len(folders)
    truths: dict[str, np.ndarray] = {}
    for reader in (ONNXRUNTIME, *readers):
        readings = {title: read(reader, folder, scratch) for title, folder in folders.items()}
        cells = [_cell(reading, truths.get(title)) for title, reading in readings.items()]
        for title, reading in readings.items():
            if reader is ONNXRUNTIME and reading.logits is not None:
                truths[title] = reading.logits
        version = next((one.version for one in readings.values() if one.logits is not None), reader.version or "newest")
        yield f"| {reader.title} | {version} | {' | '.join(cells)} |"


def _cell(reading: Reading, truth: np.ndarray | None) -> str:
    if reading.logits is None:
        return f"stops: {reading.words}"
    if truth is None:
        return "runs"
    off = float(np.abs(reading.logits - truth).max())
    return f"runs, off by {off:.1e}" if off else "runs, equal bits"
