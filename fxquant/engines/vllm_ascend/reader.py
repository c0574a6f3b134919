"""vllm-ascend from 0.11.0 on: routed experts int4 with one scale per output channel.

Per-group experts are refused since pull request 13713, after 0.26.0rc1. Source: vllm-ascend, quantization/methods.
"""

from pathlib import Path

from fxquant.engine_readers.folder import WeightFolder, stated_group_size
from fxquant.engine_readers.linear_loader import LinearRules
from fxquant.engine_readers.names import ExpertPath
from fxquant.engine_readers.packed_experts import PackedExperts
from fxquant.engine_readers.ranks import Loaded
from fxquant.engine_readers.reader import EngineReader
from fxquant.errors import FxquantError

DESCRIPTION = "quant_model_description.json"
DEFAULT_GROUP = 256
"""What releases up to 0.26.0rc1 take where the header has none."""

RULES = LinearRules(reciprocal=True, narrow_scale=True, biased=False)
"""The reciprocal of input_scale is formed in the model's dtype, in which per-token weight scales are held too."""


def open_vllm_ascend(folder: Path, ranks: int) -> EngineReader:
    """Raises FxquantError for a header with a group_size."""
    files = WeightFolder(folder, DESCRIPTION)
    group_size = stated_group_size(folder / DESCRIPTION, files.description)
    if group_size > 0:
        fact = f"group_size {group_size}: per-group experts are no longer read, only per-channel ones."
        raise FxquantError(folder / DESCRIPTION, fact, "Use group_size: 0, or a release up to 0.26.0rc1.")
    experts = PackedExperts(files, ranks, 0)

    def load(path: ExpertPath) -> Loaded:
        if "group_size" not in files.description:
            fact = f"int4 without group_size: releases up to 0.26.0rc1 take {DEFAULT_GROUP} for it, later ones 0."
            raise FxquantError(folder / DESCRIPTION, fact, 'Write "group_size": 0.')
        return experts.load(path)

    return EngineReader("vllm-ascend", files, ranks, RULES, load)
