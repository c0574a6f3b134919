"""The JSON files beside the weights: description, index, config."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxquant.lowering.engines import Engine
from fxquant.lowering.layout import FileLayout
from fxquant.program import Program

MTP_LAYERS = "num_nextn_predict_layers"


def write_json(path: Path, document: Any) -> None:
    """Two-space JSON with a final newline, keys in the order given."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def description(program: Program, files: Sequence[FileLayout], engine: Engine) -> dict[str, Any]:
    """Header keys, then one entry for every stored tensor: its type."""
    entries = {tensor.name: tensor.spec.description for file in files for tensor in file.tensors}
    return engine.header(program) | dict(sorted(entries.items()))


def index(files: Sequence[FileLayout]) -> dict[str, Any]:
    """The safetensors index of a sharded output."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def engine_config(program: Program, engine: Engine) -> dict[str, Any]:
    """The source's config.json without its `quantization_config`, plus the keys that tell an engine what it loads.

    Multi-token prediction layers that are not in the output are not announced.
    """
    config = {key: value for key, value in program.config.items() if key != "quantization_config"}
    if config.get(MTP_LAYERS) and not program.mtp.stored:
        config[MTP_LAYERS] = 0
    return config | engine.config(program)
