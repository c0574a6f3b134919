"""The JSON files beside the weights: description, index, config."""

import json
from pathlib import Path
from typing import Any

from fxquant.kinds import Kind
from fxquant.lowering.layout import STEM, FileLayout
from fxquant.program import Program
from fxquant.schemes import Scheme

DESCRIPTION = "quant_model_description.json"
INDEX = f"{STEM}.safetensors.index.json"
FORMAT_VERSION = "1.0.0"


def write_json(path: Path, document: Any) -> None:
    """Two-space JSON with a final newline, keys in the order given."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def description(program: Program, files: list[FileLayout]) -> dict[str, Any]:
    """Header keys, then one entry for every stored tensor: its type."""
    entries = {tensor.name: tensor.spec.description for file in files for tensor in file.tensors}
    header = {
        "version": FORMAT_VERSION,
        "model_quant_type": model_quant_type(program),
        "group_size": max((recipe.group_size for recipe in program.recipes.values()), default=0),
    }
    return header | dict(sorted(entries.items()))


def model_quant_type(program: Program) -> str:
    """Engines read it as the type of what is neither attention nor expert; they decide the rest tensor by tensor."""
    return (Scheme.W8A8_DYNAMIC if program.recipes else Scheme.FLOAT).value


def index(files: list[FileLayout]) -> dict[str, Any]:
    """The safetensors index of a sharded output."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def engine_config(program: Program) -> dict[str, Any]:
    """The source's config.json without its `quantization_config`, plus the keys that tell an engine what it loads."""
    config = {key: value for key, value in program.config.items() if key != "quantization_config"}
    keys = {"quantize": model_quant_type(program).lower()} if program.recipes else {}
    for key, kind in (("mla_quantize", Kind.ATTENTION), ("moe_quantize", Kind.ROUTED_EXPERT)):
        schemes = {r.scheme for module, r in program.recipes.items() if _kind(program, module) is kind}
        if len(schemes) == 1:
            keys[key] = schemes.pop().value.lower()
    return config | keys


def _kind(program: Program, module: str) -> Kind:
    return program.parameters[f"{module}.weight"].kind
