"""Description file, index and config.json: the JSON files beside the weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxquant.engines.engine import Engine
from fxquant.lowering.output_folder.layout import FileLayout
from fxquant.lowering.output_folder.remote_code import AUTO_MAP, code_files
from fxquant.lowering.output_folder.rotation_file import rotation_header
from fxquant.program.program import Program
from fxquant.storage.safetensors import quoted

INDENT = 2
MTP_LAYERS = "num_nextn_predict_layers"
ROUTING = {"moe_layer_freq": 1, "topk_method": "noaux_tc"}
"""Keys that vLLM and SGLang read of a config in deepseek_v2.py as if they were always there, while transformers' has no
default of them; with the values of DeepSeek-V3, the only ones that fxquant takes."""


def write_json(path: Path, document: Any) -> None:
    """Write JSON with two-space indent and a final newline, keys in the given order."""
    path.write_text(document_text(document), encoding="utf-8")


def document_text(document: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(document, indent=INDENT, ensure_ascii=False) + "\n"


def json_size(document: Any) -> int:
    """Bytes that `write_json` writes."""
    return len(document_text(document).encode())


def description(program: Program, files: Sequence[FileLayout], engine: Engine) -> dict[str, Any]:
    """Header keys, then one entry per stored tensor: its type."""
    entries = {tensor.name: tensor.spec.description for file in files for tensor in file.tensors}
    return _header(program, engine) | dict(sorted(entries.items()))


def _header(program: Program, engine: Engine) -> dict[str, Any]:
    return engine.header(program) | rotation_header(program.stream)


def description_size(program: Program, files: Sequence[FileLayout], engine: Engine) -> int:
    """Bytes of `description` as JSON, counted without writing it."""
    types = sum(len(quoted(spec.description)) * count for file in files for spec, count in file.specs)
    # with one empty entry the last line of the header has its comma, as it has before the tensors' lines
    return json_size(_header(program, engine) | {"": ""}) - len('\n  "": ""') + _lines(files, types, depth=1)


def index(files: Sequence[FileLayout]) -> dict[str, Any]:
    """The safetensors index of a sharded output."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    return _index(files, dict(sorted(weight_map.items())))


def index_size(files: Sequence[FileLayout]) -> int:
    """Bytes of `index` as JSON, counted without writing it."""
    names = sum(len(quoted(file.name)) * len(file.tensors) for file in files)
    return json_size(_index(files, {"": ""})) - len('\n    "": ""') + _lines(files, names, depth=2)


def _index(files: Sequence[FileLayout], weight_map: dict[str, str]) -> dict[str, Any]:
    return {"metadata": {"total_size": sum(file.data_bytes for file in files)}, "weight_map": weight_map}


def _lines(files: Sequence[FileLayout], values: int, depth: int) -> int:
    """Bytes of one line per tensor, name and value, with the commas between them; `values`: bytes of all values."""
    count = sum(len(file.tensors) for file in files)
    return sum(file.names_size for file in files) + values + count * (len("\n: ,") + INDENT * depth) - 1


def engine_config(program: Program, engine: Engine, folder: Path | None = None) -> dict[str, Any]:
    """The source's config.json without its `quantization_config`, plus the keys by which an engine knows the format.

    It announces multi-token prediction layers exactly if they are in the output: without the key engines and
    transformers take it for one. It has `auto_map` exactly if `folder` has the files that it names. `ROUTING` is there
    also where the source leaves it out.
    """
    config = {key: value for key, value in program.config.items() if key != "quantization_config"}
    if folder is None or code_files(config, folder) is None:
        config.pop(AUTO_MAP, None)
    config[MTP_LAYERS] = len(program.mtp.layers) if program.mtp.stored else 0
    return config | {key: value for key, value in ROUTING.items() if key not in config} | engine.config(program)
