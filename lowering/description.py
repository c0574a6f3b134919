"""The JSON files beside the weights: description, index, config."""

import json
from collections import Counter
from operator import attrgetter
from pathlib import Path
from typing import Any

from fxquant.lowering.engines import Engine
from fxquant.lowering.layout import FileLayout
from fxquant.program import Program
from fxquant.safetensors_file import quoted

INDENT = 2
MTP_LAYERS = "num_nextn_predict_layers"


def write_json(path: Path, document: Any) -> None:
    """Two-space JSON with a final newline, keys in the order given."""
    path.write_text(json.dumps(document, indent=INDENT, ensure_ascii=False) + "\n", encoding="utf-8")


def json_size(document: Any) -> int:
    """Bytes that `write_json` writes; maps of texts are counted by their keys and values, and not written out."""
    return _json_size(document, 0) + 1


def _json_size(value: Any, depth: int) -> int:
    """At `depth` levels of indentation; a map has a line an entry, commas between them, and its braces."""
    if not isinstance(value, dict) or set(map(type, value)) != {str}:
        text = json.dumps(value, indent=INDENT, ensure_ascii=False)
        return len(text.encode()) + text.count("\n") * INDENT * depth
    lines = len(value) * (len("\n: ,") + INDENT * (depth + 1)) - 1
    keys = len(quoted("".join(value)).encode()) - 2 + 2 * len(value)  # escapes are made letter by letter
    texts = Counter(item for item in value.values() if type(item) is str)
    values = sum(len(quoted(text).encode()) * count for text, count in texts.items())
    others = sum(_json_size(item, depth + 1) for item in value.values() if type(item) is not str)
    return lines + keys + values + others + len("{\n}") + INDENT * depth


def description(program: Program, files: list[FileLayout], engine: Engine, in_order: bool = True) -> dict[str, Any]:
    """Header keys, then one entry for every stored tensor: its type."""
    entries: dict[str, str] = {}
    for file in files:
        entries.update(zip(file.names, map(attrgetter("spec.description"), file.tensors), strict=True))
    return engine.header(program) | (dict(sorted(entries.items())) if in_order else entries)


def index(files: list[FileLayout], in_order: bool = True) -> dict[str, Any]:
    """The safetensors index of a sharded output."""
    weight_map: dict[str, str] = {}
    for file in files:
        weight_map.update(dict.fromkeys(file.names, file.name))
    total = sum(file.data_bytes for file in files)
    return {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())) if in_order else weight_map,
    }


def engine_config(program: Program, engine: Engine) -> dict[str, Any]:
    """The source's config.json without its `quantization_config`, plus the keys that tell an engine what it loads.

    Multi-token prediction layers that are not in the output are not announced.
    """
    config = {key: value for key, value in program.config.items() if key != "quantization_config"}
    if config.get(MTP_LAYERS) and not program.mtp.stored:
        config[MTP_LAYERS] = 0
    return config | engine.config(program)
