"""MindIE: reads tensors by name, each section of the model under the one type that config.json gives it.

Packed int4 experts with scale_bias, and a second scale unless the description says group_size 0. Integers, scale_bias
and the deq_scale of bfloat16 models are kept, everything else is rounded to the model's dtype on load.
Source: MindIE-LLM, atb_llm: utils/weights.py, utils/quantize, models/deepseek and models/deepseekv2.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxquant.engine_readers.folder import stated_group_size
from fxquant.engine_readers.linear_loader import (
    FLOAT,
    W4A8_DYNAMIC,
    W8A8,
    W8A8_DYNAMIC,
    W8A8_MIX,
    LinearRules,
    load_linear,
)
from fxquant.engine_readers.names import ExpertPath, part_of_layer
from fxquant.engine_readers.packed_experts import PackedExperts
from fxquant.engine_readers.ranks import Loaded
from fxquant.engine_readers.shared_as_routed import SharedAsRoutedReader, open_model_type
from fxquant.engine_readers.split import Split
from fxquant.errors import FxquantError

DESCRIPTION = "quant_model_description.json"
MODEL_TYPE = "deepseekv2"
GROUP_SIZES = (0, 64, 128, 256)
ATTENTION = "self_attn"

RULES = LinearRules(reciprocal=False, narrow_scale=True, biased=False)
"""Linears are built without `.bias` unless config.json has attention_bias; weight_scale has the model's dtype."""

READ_AS = {
    "w8a8": {W8A8: W8A8},
    "w8a8_dynamic": {W8A8_DYNAMIC: W8A8_DYNAMIC, W8A8: W8A8_DYNAMIC},
    "w8a8_pdmix": {W8A8_MIX: W8A8_MIX},
    "w4a8_dynamic": {W4A8_DYNAMIC: W4A8_DYNAMIC},
}
"""Type in config.json → described type → how its tensors are read. Static ones of a section w8a8_dynamic are read per
token, from weight and weight_scale (quantize/pack_type.py)."""


@dataclass(frozen=True)
class MindieReader(SharedAsRoutedReader):
    """A module is read as the one type that config.json gives its section."""

    def linear(self, module: str, row_parallel: bool = False) -> Loaded:
        if self.as_routed(module) is not None:
            return super().linear(module, row_parallel)
        section = "mla_quantize" if part_of_layer(module) == ATTENTION else "quantize"
        kind = self._read_as(module, self.folder.type_of(module), section)
        return load_linear(self.folder, self.rules, module, Split(self.ranks, row_parallel), kind)

    def locate(self, module: str) -> ExpertPath:
        """A routed expert, or the shared one that runs with them: of the type of their section."""
        path = super().locate(module)
        projection = path.module(path.projection)
        self._read_as(projection, self.folder.type_of(projection), "moe_quantize")
        return path

    def fused_with(self, module: str) -> tuple[str, ...]:
        """Attention's first two projections are linears of their own here."""
        return () if part_of_layer(module) == ATTENTION else super().fused_with(module)

    def check_fused(self, group: tuple[str, ...]) -> None:
        """Read per token, static shards need no common scale."""
        if self._section_type("quantize") != "w8a8_dynamic":
            super().check_fused(group)

    def norm(self, module: str) -> tuple[Tensor, Tensor]:
        """weight and bias of a norm; a missing bias is zeros."""
        weight = self.folder.tensor(f"{module}.weight")
        described = f"{module}.bias" in self.folder.description
        return weight, self.folder.tensor(f"{module}.bias") if described else torch.zeros_like(weight)

    def _read_as(self, module: str, described: str, section: str) -> str:
        """How a module's tensors are read. Raises FxquantError where the type of its section does not fit them."""
        if described == FLOAT:
            return FLOAT
        stated = self._section_type(section)
        if stated not in READ_AS:
            fact = f"{section} {stated!r} of config.json; MindIE knows {', '.join(READ_AS)}."
            raise FxquantError(module, fact, "Write one of them.")
        if described not in READ_AS[stated]:
            fact = f"{described}, but {section} of config.json is {stated}, for all modules of the section."
            raise FxquantError(module, fact, "Give the section one type.")
        return READ_AS[stated][described]

    def _section_type(self, section: str) -> str:
        stated = self.folder.config.get(section, self.folder.config.get("quantize"))
        return "w8a8_pdmix" if section == "quantize" and stated == "w8a8_mix" else str(stated)


def open_mindie(folder: Path, ranks: int) -> MindieReader:
    """Raises FxquantError for a model_type under which MindIE looks for another model, and for other group sizes than
    it takes."""
    files, quantization = open_model_type(folder, DESCRIPTION, "MindIE", MODEL_TYPE)
    merged = quantization | files.description  # the description's keys overrule those of config.json
    group_size = stated_group_size(folder / DESCRIPTION, merged)
    if group_size not in GROUP_SIZES:
        fact = f"group_size {group_size}; MindIE takes {', '.join(map(str, GROUP_SIZES))}."
        raise FxquantError(folder / DESCRIPTION, fact, "Quantize with one of them.")
    if "group_size" not in files.description and group_size == 0:
        group_size = GROUP_SIZES[-1]  # without the key it asks for second scales
    return MindieReader("mindie", files, ranks, RULES, PackedExperts(files, ranks, group_size, by_name=True).load)
