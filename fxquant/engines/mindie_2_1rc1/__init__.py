"""MindIE 2.1.RC1 and earlier: format `unpacked`, its own name of the description, and no header with a group size."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fxquant.engines import mindie
from fxquant.engines.documents import model_quant_type
from fxquant.engines.engine import Engine
from fxquant.schemes.weight_formats import WeightFormat

if TYPE_CHECKING:
    from fxquant.engine_readers import EngineReader


def _open_reader(folder: Path, ranks: int, group_size: int) -> "EngineReader":
    from fxquant.engines.mindie_2_1rc1.reader import open_mindie_2_1rc1

    return open_mindie_2_1rc1(folder, ranks)


ENGINE: Engine = replace(
    mindie.ENGINE,
    weight_format=lambda group_size: WeightFormat.UNPACKED,
    description="quant_model_description_w8a8_dynamic.json",
    header=lambda program: {"model_quant_type": model_quant_type(program)},
    open_reader=_open_reader,
)
