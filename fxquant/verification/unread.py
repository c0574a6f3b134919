"""Unread parts of an output, file by file: what verification has not looked at."""

import os
from pathlib import Path

from fxquant.calibration.calibration_file import CALIBRATION
from fxquant.engines.engine import Engine
from fxquant.lowering.ascend.export.exported import DECODE, PREFILL
from fxquant.lowering.ascend.writer import FILE as ASCEND_GRAPH
from fxquant.lowering.onnx.writer import FILE as ONNX_GRAPH
from fxquant.lowering.output_folder.manifest import FLOAT_GRAPH, GRAPH, LEDGER, MANIFEST, STAMPS
from fxquant.lowering.output_folder.serving_page import SERVING

ALL = "all of it"


def unread_with(folder: Path) -> dict[str, str]:
    """File → what is not looked at, if every other file has a digest in the manifest."""
    there = os.path.lexists(folder / STAMPS)
    stamps = ALL if there else "missing; it only saves a later compile work"
    return {MANIFEST: "what no other file says, such as the policy's name", STAMPS: stamps}


def unread_without(folder: Path, engine: Engine, known: set[str], rotated: bool) -> dict[str, str]:
    """The same without a manifest. `known`: files that were compared with the source, or read tensor by tensor.

    Files that every output has are named whether they exist or not: nothing says that they did.
    """
    unread = dict.fromkeys(
        (FLOAT_GRAPH, LEDGER, SERVING, STAMPS, *((PREFILL, DECODE) if engine.npu_graph else ())), ALL
    )
    unread |= {GRAPH: "the policy's rules in it", CALIBRATION: "the ranges in it, and the text's hash"}
    unread |= {} if engine.npu_graph else {ONNX_GRAPH: "the version of fxquant, policy and source that it names"}
    if rotated:
        unread[FLOAT_GRAPH] = "all but the rotations that it needs"
    read = known | set(unread) | {"config.json", engine.description, engine.index, ASCEND_GRAPH}
    others = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not _is_folder(path))
    return unread | {name: ALL for name in others if name not in read}


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
