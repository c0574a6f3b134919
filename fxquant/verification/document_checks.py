"""Document checks: the JSON files of an output against what follows from the graph and the files, to the byte."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.inputs.json_file import read_json, read_text
from fxquant.inputs.limits import GRAPH_BYTES, INDEX_BYTES
from fxquant.inputs.validation import cut
from fxquant.lowering.onnx.genai_config import GENERATION, genai_config
from fxquant.lowering.onnx.required import stored_form
from fxquant.lowering.output_folder.copies import GENAI_CONFIG, copied_files
from fxquant.lowering.output_folder.description import description, document_text, engine_config
from fxquant.lowering.output_folder.layout import FileLayout, StoredTensor
from fxquant.lowering.output_folder.manifest import GRAPH
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program
from fxquant.verification.report import Check

GRAPH_SAYS = "the graph says"
CONFIG = "config.json"
"""May contain NaN, as the source's may, in a key that nobody reads."""


@dataclass(frozen=True)
class Documents:
    """Expected JSON files of an output: path → entries, and where they come from."""

    folder: Path
    expected: dict[str, tuple[dict[str, Any], str]]

    def check(self, name: str, files: list[str]) -> Check:
        """Every entry of these files, and that there is no other."""
        check = Check(name, sum(len(self.expected[file][0]) for file in files))
        for file in files:
            self._check(check, file)
        return check

    def _check(self, check: Check, file: str) -> None:
        expected, who = self.expected[file]
        try:
            written = read_json(self.folder / file, INDEX_BYTES, lenient=file == CONFIG)
        except FxquantError as error:
            check.expect(False, f"{file}: {error.fact}")
            return
        if not isinstance(written, dict):
            check.expect(False, f"{file}: not a JSON object")
            return
        for key, ours, theirs in _entries(expected, written):
            miss = f"{file}: {cut(key, 200)}: {theirs!r:.200}, {who} {ours!r:.200}"
            check.expect(ours == theirs or json_text(ours) == json_text(theirs), miss)

    def written(self, program: Program) -> Check:
        """These files and the stored graph have the expected bytes, not only the same entries."""
        check = Check("documents, as written", len(self.expected) + 1)
        texts = {file: document_text(document) for file, (document, _) in self.expected.items()} | {
            GRAPH: dump_program(program)
        }
        for file, text in texts.items():
            try:
                same = read_text(self.folder / file, GRAPH_BYTES) == text
            except FxquantError:
                same = False
            check.expect(same, f"{file}: its bytes differ from those written")
        return check


def documents(
    program: Program, folder: Path, stored: list[StoredTensor], files: WeightFiles, target: Target
) -> Documents:
    """config.json, description, the index for several weight files or if it exists, and genai_config.json of halves."""
    engine = ENGINES[target]
    described = description(program, [FileLayout("", tuple(stored))], engine)
    expected = {
        CONFIG: (engine_config(program, engine, folder), GRAPH_SAYS),
        engine.description: (described, GRAPH_SAYS),
    }
    several = len({info.file for info in files.infos.values()}) > 1
    if several or engine.numbered or os.path.lexists(folder / engine.index):
        weight_map = {name: info.file.name for name, info in sorted(files.infos.items())}
        total = sum(info.nbytes for info in files.infos.values())
        expected[engine.index] = ({"metadata": {"total_size": total}, "weight_map": weight_map}, "the files say")
    if not engine.npu_graph and _in_halves(folder):
        expected[GENAI_CONFIG] = (genai_config(program, folder), f"the graph and {GENERATION} say")
    return Documents(folder, expected)


def _in_halves(folder: Path) -> bool:
    """Whether the cache of its model.onnx is; the check of that file says why it can't be read."""
    try:
        return stored_form(folder).cache is OnnxCache.HALVES
    except FxquantError:
        return False


def json_text(value: Any) -> str:
    """As JSON, in which NaN equals NaN."""
    return json.dumps(value, sort_keys=True)


def _entries(expected: dict[str, Any], written: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key and its value in both; for the map of an index, one entry per tensor."""
    entries = []
    for key in sorted(set(expected) | set(written)):
        ours, theirs = expected.get(key), written.get(key)
        if key == "weight_map" and isinstance(ours, dict) and isinstance(theirs, dict):
            entries += [(name, ours.get(name), theirs.get(name)) for name in sorted(set(ours) | set(theirs))]
        else:
            entries.append((key, ours, theirs))
    return entries


def check_copies(source: Checkpoint, folder: Path) -> Check:
    """Tokenizer and other copied files equal the source's. For outputs without a manifest, which has their digests."""
    files = copied_files(source)
    check = Check("copied files == source", len(files))
    for name, file in files.items():
        copy = folder / name
        same = copy.is_file() and copy.read_bytes() == file.read_bytes()
        check.expect(same, f"{name}: {'differs from' if copy.is_file() else 'missing, it is in'} the source")
    return check
