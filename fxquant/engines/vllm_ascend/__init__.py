"""vllm-ascend from 0.11.0 on, newer releases included: format `per_channel`."""

from pathlib import Path
from typing import TYPE_CHECKING

from fxquant.engines.documents import FORMAT_VERSION, group_size, scheme_keys
from fxquant.engines.engine import Engine, JsonObject
from fxquant.engines.vllm_ascend.serving import serve
from fxquant.schemes.weight_formats import WeightFormat

if TYPE_CHECKING:
    from fxquant.engine_readers import EngineReader
    from fxquant.program.program import Program


def _header(program: "Program") -> JsonObject:
    return {
        "version": FORMAT_VERSION,
        "model_quant_type": _model_quant_type(program),
        "metadata": {},
        "group_size": group_size(program),
        "optional": {},
    }


def _model_quant_type(program: "Program") -> str:
    """The most demanding int8 type; int4 does not rank."""
    from fxquant.schemes.schemes import Scheme

    schemes = {recipe.scheme for recipe in program.recipes.values()}
    ranked = (Scheme.W8A8, Scheme.W8A8_MIX, Scheme.W8A8_DYNAMIC)
    return next(
        (candidate for candidate in ranked if candidate in schemes),
        Scheme.FLOAT if not schemes else Scheme.W8A8_DYNAMIC,
    ).value


def _open_reader(folder: Path, ranks: int, group_size: int) -> "EngineReader":
    from fxquant.engines.vllm_ascend.reader import open_vllm_ascend

    return open_vllm_ascend(folder, ranks)


ENGINE = Engine(
    weight_format=lambda group_size: WeightFormat.PER_CHANNEL,
    stem="quant_model_weights",
    int4_group_size=0,
    numbered=True,
    description="quant_model_description.json",
    header=_header,
    config=scheme_keys,
    mtp_files=False,
    open_reader=_open_reader,
    serve=serve,
)
