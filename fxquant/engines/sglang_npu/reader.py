"""SGLang on NPU, releases 0.5.9 to 0.5.23: int4 experts per channel and whole, int8 linears static or dynamic.

Held against these releases by tests/engines/released/test_sglang.py. Source: srt/layers/quantization/modelslim,
srt/layers/moe/fused_moe_triton/layer.py, srt/models/deepseek_common/deepseek_weight_loader.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from fxquant.engine_readers.folder import WeightFolder, stated_group_size
from fxquant.engine_readers.linear_loader import FLOAT, W8A8, W8A8_DYNAMIC, LinearRules
from fxquant.engine_readers.names import ExpertPath
from fxquant.engine_readers.packed_experts import PackedExperts
from fxquant.engine_readers.ranks import Loaded, Ranks
from fxquant.engine_readers.reader import EngineReader
from fxquant.errors import FxquantError

NAME = "sglang-npu"
DESCRIPTION = "quant_model_description.json"

RULES = LinearRules(reciprocal=True, narrow_scale=True, biased=False)
"""The reciprocal of input_scale is formed in the model's dtype, in which per-token weight scales are held too."""

ALWAYS_FLOAT = ("lm_head", "head", "eh_proj", "kv_b_proj")
"""Modules that its model makes, or computes, in floating point whatever the description says."""


@dataclass(frozen=True)
class SGLangReader(EngineReader):
    """Its reading: what it has no scheme for it would read as float codes, or stop at."""

    def linear(self, module: str, row_parallel: bool = False) -> Loaded:
        kind = self.folder.type_of(module)
        if kind not in (FLOAT, W8A8, W8A8_DYNAMIC):
            fact = f"{kind}: the engine has no scheme for it on linears."
            raise FxquantError(module, fact, "Use W8A8 or W8A8_DYNAMIC.")
        if kind != FLOAT and module.rpartition(".")[2] in ALWAYS_FLOAT:
            raise FxquantError(module, f"{kind}: the engine computes it in floating point.", "Keep it FLOAT.")
        return super().linear(module, row_parallel)

    def expert_linear(self, module: str, row_parallel: bool = False) -> Loaded:
        path = self.locate(module)
        if self.folder.type_of(path.module(path.projection)) == FLOAT:
            fact = "FLOAT: the engine has no float experts beside quantized linears."
            raise FxquantError(path.stored, fact, "Use W8A8_DYNAMIC or W4A8_DYNAMIC.")
        return super().expert_linear(module, row_parallel)


def open_sglang_npu(folder: Path, ranks: int) -> EngineReader:
    """Raises FxquantError for a header with a group_size, whose weight_scale_second it skips, and a float16 model."""
    files = WeightFolder(folder, DESCRIPTION)
    place = folder / DESCRIPTION
    group_size = stated_group_size(place, files.description)
    if group_size:
        fact = f"group_size {group_size}: every release skips weight_scale_second and reads per channel."
        raise FxquantError(place, fact, "Use group_size: 0.")
    if files.dtype is not torch.bfloat16:
        fact = "float16: per-token linears would hand npu_quant_matmul a float16 scale, which it does not take."
        raise FxquantError(folder / "config.json", fact, "Set torch_dtype to bfloat16 and compile again.")

    def load_int4(path: ExpertPath) -> Ranks:
        if ranks > 1:
            fact = f"int4 on {ranks} ranks: each adds the whole scale_bias of down_proj to its part of the sum."
            raise FxquantError(path.stored, fact, "Use one rank, or expert parallelism.")
        return PackedExperts(files, ranks, 0).load(path)

    return SGLangReader(NAME, files, ranks, RULES, load_int4)
