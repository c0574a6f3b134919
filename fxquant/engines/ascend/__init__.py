"""Common Ascend format, `packed`, which vllm-ascend 0.11.0 to 0.26.0rc1 load."""

from pathlib import Path
from typing import TYPE_CHECKING

from fxquant.engines.documents import scheme_keys, versioned_header
from fxquant.engines.engine import Engine
from fxquant.engines.vllm_ascend.serving import serve
from fxquant.schemes.weight_formats import WeightFormat

if TYPE_CHECKING:
    from fxquant.engine_readers import EngineReader


def _open_reader(folder: Path, ranks: int, group_size: int) -> "EngineReader":
    """The same releases read experts of two levels and of one."""
    from fxquant.engines.ascend.reader import open_vllm_ascend_per_group
    from fxquant.engines.vllm_ascend.reader import open_vllm_ascend

    return (open_vllm_ascend_per_group if group_size else open_vllm_ascend)(folder, ranks)


ENGINE = Engine(
    weight_format=lambda group_size: WeightFormat.PACKED,
    stem="quant_model_weight_w8a8",
    description="quant_model_description.json",
    header=versioned_header,
    config=scheme_keys,
    open_reader=_open_reader,
    serve=serve,
)
