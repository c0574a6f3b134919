"""MindIE: format `packed`, the names of the reference tool, and a type for each section of the model in config.json."""

from pathlib import Path
from typing import TYPE_CHECKING

from fxquant.engines.documents import group_size, scheme_keys, versioned_header
from fxquant.engines.engine import Engine, JsonObject
from fxquant.engines.mindie.serving import WHERE, serve
from fxquant.schemes.weight_formats import WeightFormat

if TYPE_CHECKING:
    from fxquant.engine_readers import EngineReader
    from fxquant.program.program import Program

OWN_NAMES = {"w8a8_mix": "w8a8_pdmix"}
"""Types that it knows by another name: it renames `quantize` itself, and no other key (models/base/router.py)."""


def _config(program: "Program") -> JsonObject:
    quantization = {"kv_quant_type": None, "fa_quant_type": None, "group_size": group_size(program)}
    model_type = {"model_type": "deepseekv2"}  # the name under which MindIE serves V2, V3 and R1
    types = {key: OWN_NAMES.get(value, value) for key, value in scheme_keys(program).items()}
    return model_type | types | ({"quantization_config": quantization} if program.recipes else {})


def _open_reader(folder: Path, ranks: int, group_size: int) -> "EngineReader":
    from fxquant.engines.mindie.reader import open_mindie

    return open_mindie(folder, ranks)


ENGINE = Engine(
    weight_format=lambda group_size: WeightFormat.PACKED,
    stem="quant_model_weight_w8a8_dynamic",
    numbered=True,
    description="quant_model_description.json",
    header=versioned_header,
    config=_config,
    open_reader=_open_reader,
    serve=serve,
    where=WHERE,
    reads_sections=True,
)
