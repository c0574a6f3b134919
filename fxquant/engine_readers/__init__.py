"""Weight folders read as each Ascend engine reads them, on CPU, from the description of the formats alone.

Nothing here knows how a folder was written: the readers import nothing of fxquant but its errors, so that writer and
reader can only agree on bytes that mean the same.
"""

from collections.abc import Callable
from pathlib import Path

from fxquant.engine_readers.arithmetic import Arithmetic
from fxquant.engine_readers.mindie import open_mindie
from fxquant.engine_readers.ranks import Loaded
from fxquant.engine_readers.reader import EngineReader
from fxquant.engine_readers.sglang_npu import open_sglang_npu
from fxquant.engine_readers.vllm_ascend import open_vllm_ascend
from fxquant.engine_readers.vllm_ascend_per_group import open_vllm_ascend_per_group
from fxquant.errors import FxquantError

READERS: dict[str, Callable[[Path, int], EngineReader]] = {
    "vllm-ascend": open_vllm_ascend,
    "vllm-ascend-per-group": open_vllm_ascend_per_group,
    "mindie": open_mindie,
    "sglang-npu": open_sglang_npu,
}


def open_reader(name: str, folder: Path, tp: int = 1) -> EngineReader:
    """`folder` as the engine `name` reads it on `tp` tensor-parallel ranks.

    Raises FxquantError for an unknown engine, and where the engine refuses the folder as a whole.
    """
    if name not in READERS:
        raise FxquantError(name, f"no such engine; there are {', '.join(READERS)}.", "Name one of them.")
    if tp < 1:
        raise FxquantError("tp", f"{tp} ranks.", "Use at least one.")
    return READERS[name](Path(folder), tp)


__all__ = ["READERS", "Arithmetic", "EngineReader", "Loaded", "open_reader"]
