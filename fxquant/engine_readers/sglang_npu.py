"""SGLang on NPU: the operators of vllm-ascend; the header's group_size decides between its two kinds of experts."""

from pathlib import Path

from fxquant.engine_readers.folder import WeightFolder, stated_number
from fxquant.engine_readers.packed_experts import PackedExperts
from fxquant.engine_readers.reader import EngineReader
from fxquant.engine_readers.vllm_ascend import DESCRIPTION, RULES
from fxquant.engine_readers.vllm_ascend_per_group import check_packed


def open_sglang_npu(folder: Path, ranks: int) -> EngineReader:
    """group_size above 0: integer group scales; 0 or none: one scale per output channel."""
    files = WeightFolder(folder, DESCRIPTION)
    group_size = stated_number(folder / DESCRIPTION, files.description, "group_size")
    if group_size:
        check_packed(files)
    return EngineReader("sglang-npu", files, ranks, RULES, PackedExperts(files, ranks, group_size).load)
