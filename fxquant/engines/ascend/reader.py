"""vllm-ascend 0.11.0 to 0.26.0rc1: packed int4 experts with integer group scales.

Its combined scale is rounded to float16. Source: vllm-ascend, quantization/w4a8_dynamic.py of these releases.
"""

from pathlib import Path

from fxquant.engine_readers.folder import WeightFolder
from fxquant.engine_readers.linear_loader import LinearRules
from fxquant.engine_readers.names import ExpertPath
from fxquant.engine_readers.packed_experts import PackedExperts
from fxquant.engine_readers.packed_reader import check_packed
from fxquant.engine_readers.ranks import Loaded
from fxquant.engine_readers.reader import EngineReader
from fxquant.errors import FxquantError

DESCRIPTION = "quant_model_description.json"
DEFAULT_GROUP = 256

RULES = LinearRules(reciprocal=True, narrow_scale=True, biased=False)
"""The reciprocal of input_scale is formed in the model's dtype, in which per-token weight scales are held too."""


def open_vllm_ascend_per_group(folder: Path, ranks: int) -> EngineReader:
    """Raises FxquantError for a header by which the engine would not read the weights as packed and grouped."""
    files = WeightFolder(folder, DESCRIPTION)
    group_size = files.description.get("group_size", DEFAULT_GROUP)
    if type(group_size) is not int or group_size <= 0:
        fact = f"group_size {str(group_size)[:40]}: the experts are per channel."
        raise FxquantError(folder / DESCRIPTION, fact, "Read them as vllm-ascend.")
    check_packed(files)
    load = PackedExperts(files, ranks, group_size).load if ranks == 1 else _split
    return EngineReader("vllm-ascend-per-group", files, ranks, RULES, load)


def _split(path: ExpertPath) -> Loaded:
    """No release after 0.11.0 loads them: the first-level scale [n, 1] of down_proj is sharded as its groups are."""
    fact = "two-level, split over ranks: 0.13.0 and 0.18.0 fail at weight_scale of down_proj, 0.23.0 leaves it unset."
    raise FxquantError(path.stored, fact, "Serve with expert parallelism, which keeps experts whole, or per channel.")
