"""MindIE: format `unpacked`, its own name of the description, and keys in config.json instead of a header."""

from pathlib import Path
from typing import TYPE_CHECKING

from fxquant.engines.documents import group_size, model_quant_type, scheme_keys
from fxquant.engines.engine import Engine, JsonObject
from fxquant.engines.mindie.serving import serve
from fxquant.schemes.weight_formats import WeightFormat

if TYPE_CHECKING:
    from fxquant.engine_readers import EngineReader
    from fxquant.program.program import Program


def _config(program: "Program") -> JsonObject:
    quantization = {"kv_quant_type": None, "fa_quant_type": None, "group_size": group_size(program)}
    model_type = {"model_type": "deepseekv2"}  # the name under which MindIE serves V2, V3 and R1
    return model_type | scheme_keys(program) | ({"quantization_config": quantization} if program.recipes else {})


def _open_reader(folder: Path, ranks: int, group_size: int) -> "EngineReader":
    from fxquant.engines.mindie.reader import open_mindie

    return open_mindie(folder, ranks)


ENGINE = Engine(
    weight_format=lambda group_size: WeightFormat.UNPACKED,
    stem="quant_model_weight_w8a8_dynamic",
    numbered=True,
    description="quant_model_description_w8a8_dynamic.json",
    header=lambda program: {"model_quant_type": model_quant_type(program)},
    config=_config,
    open_reader=_open_reader,
    serve=serve,
    reads_sections=True,
)
