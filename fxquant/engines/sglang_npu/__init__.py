"""SGLang on NPU, which reads int4 experts per channel: format `per_channel`."""

from pathlib import Path
from typing import TYPE_CHECKING

from fxquant.engines.documents import scheme_keys, versioned_header
from fxquant.engines.engine import Engine
from fxquant.engines.sglang_npu.serving import serve
from fxquant.schemes.weight_formats import WeightFormat

if TYPE_CHECKING:
    from fxquant.engine_readers import EngineReader


def _open_reader(folder: Path, ranks: int, group_size: int) -> "EngineReader":
    from fxquant.engines.sglang_npu.reader import open_sglang_npu

    return open_sglang_npu(folder, ranks)


ENGINE = Engine(
    weight_format=lambda group_size: WeightFormat.PER_CHANNEL,
    stem="quant_model_weights",
    int4_group_size=0,
    numbered=True,
    description="quant_model_description.json",
    header=versioned_header,
    config=scheme_keys,
    mtp_files=False,
    open_reader=_open_reader,
    serve=serve,
)
