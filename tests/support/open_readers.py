"""Readers of all engines by name, for tests that hold several against one folder."""

from dataclasses import replace
from pathlib import Path

from fxquant.engine_readers import EngineReader
from fxquant.engine_readers.packed_experts import PackedExperts
from fxquant.engines.ascend.reader import DEFAULT_GROUP, open_vllm_ascend_per_group
from fxquant.engines.mindie.reader import open_mindie
from fxquant.engines.mindie_2_1rc1.reader import open_mindie_2_1rc1
from fxquant.engines.sglang_npu.reader import open_sglang_npu
from fxquant.engines.vllm_ascend.reader import open_vllm_ascend


def open_split_two_level(folder: Path, ranks: int) -> EngineReader:
    """As `open_vllm_ascend_per_group`, with experts split over the ranks, as 0.11.0 alone does it."""
    opened = open_vllm_ascend_per_group(folder, 1)
    group_size = int(opened.folder.description.get("group_size", DEFAULT_GROUP))
    return replace(opened, ranks=ranks, load_int4=PackedExperts(opened.folder, ranks, group_size).load)


READERS = {
    "vllm-ascend": open_vllm_ascend,
    "vllm-ascend-per-group": open_split_two_level,
    "mindie": open_mindie,
    "mindie-2.1rc1": open_mindie_2_1rc1,
    "sglang-npu": open_sglang_npu,
}


def open_reader(name: str, folder: Path, ranks: int = 1) -> EngineReader:
    """`folder` as the reader of that name reads it."""
    return READERS[name](folder, ranks)
