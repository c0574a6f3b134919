"""Readers of all engines by name, for tests that hold several against one folder."""

from pathlib import Path

from fxquant.engine_readers import EngineReader
from fxquant.engines.ascend.reader import open_vllm_ascend_per_group
from fxquant.engines.mindie.reader import open_mindie
from fxquant.engines.mindie_2_1rc1.reader import open_mindie_2_1rc1
from fxquant.engines.sglang_npu.reader import open_sglang_npu
from fxquant.engines.vllm_ascend.reader import open_vllm_ascend

READERS = {
    "vllm-ascend": open_vllm_ascend,
    "vllm-ascend-per-group": open_vllm_ascend_per_group,
    "mindie": open_mindie,
    "mindie-2.1rc1": open_mindie_2_1rc1,
    "sglang-npu": open_sglang_npu,
}


def open_reader(name: str, folder: Path, ranks: int = 1) -> EngineReader:
    """`folder` as the reader of that name reads it."""
    return READERS[name](folder, ranks)
