"""SGLang on NPU: the operators of vllm-ascend; the header's group_size decides between its two kinds of experts."""

from pathlib import Path

from fxquant.engine_readers.linear_loader import LinearRules
from fxquant.engine_readers.packed_reader import open_packed
from fxquant.engine_readers.reader import EngineReader

NAME = "sglang-npu"
DESCRIPTION = "quant_model_description.json"

RULES = LinearRules(reciprocal=True, narrow_scale=True, biased=False)
"""Those of vllm-ascend, whose operators it calls."""


def open_sglang_npu(folder: Path, ranks: int) -> EngineReader:
    """group_size above 0: integer group scales; 0 or none: one scale per output channel."""
    return open_packed(NAME, folder, ranks, DESCRIPTION, RULES)
