"""MindIE: reads tensors by name, each section of the model under the one type that config.json gives it.

Packed int4 experts with scale_bias, and a second scale unless the description says group_size 0. Integers, scale_bias
and the deq_scale of bfloat16 models are kept, everything else is rounded to the model's dtype on load.
Source: MindIE-LLM, atb_llm: utils/weights.py, utils/quantize, models/deepseek and models/deepseekv2.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fxquant.engine_readers.folder import WeightFolder, stated_number
from fxquant.engine_readers.linear_loader import (
    FLOAT,
    W4A8_DYNAMIC,
    W8A8,
    W8A8_DYNAMIC,
    W8A8_MIX,
    LinearRules,
    load_linear,
)
from fxquant.engine_readers.names import ExpertPath, expert_path
from fxquant.engine_readers.packed_experts import PackedExperts
from fxquant.engine_readers.ranks import Loaded
from fxquant.engine_readers.reader import EngineReader
from fxquant.engine_readers.split import Split
from fxquant.errors import FxquantError

DESCRIPTION = "quant_model_description.json"
MODEL_TYPE = "deepseekv2"
GROUP_SIZES = (0, 64, 128, 256)
ATTENTION, SHARED = "self_attn", "shared_experts"

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
class MindieReader(EngineReader):
    """With mix_shared_routing the shared expert runs as one more routed expert, with the number after the last.

    Only then is it of type W4A8_DYNAMIC: MindIE refuses that type without the option, and other types with it.
    """

    def linear(self, module: str, row_parallel: bool = False) -> Loaded:
        mlp, _, projection = module.rpartition(f".{SHARED}.")
        if mlp and self.folder.type_of(module) == W4A8_DYNAMIC:
            return self.expert_linear(f"{mlp}.experts.{self._routed}.{projection}", row_parallel)
        section = "mla_quantize" if f".{ATTENTION}." in module else "quantize"
        kind = self._read_as(module, self.folder.type_of(module), section)
        return load_linear(self.folder, self.rules, module, Split(self.ranks, row_parallel), kind)

    def locate(self, module: str) -> ExpertPath:
        """The expert after the last routed one is stored under shared_experts; all its projections are W4A8_DYNAMIC."""
        path = expert_path(module)
        if path.index == self._routed:
            path = replace(path, stored=f"{path.parent.removesuffix('.experts')}.{SHARED}")
        kind = self.folder.type_of(path.module(path.projection))
        if path.index == self._routed and kind != W4A8_DYNAMIC:
            fact = f"{kind}; with mix_shared_routing it runs with the routed experts."
            raise FxquantError(path.module(path.projection), fact, "Give it W4A8_DYNAMIC, or switch the option off.")
        self._read_as(path.module(path.projection), kind, "moe_quantize")
        return path

    def fused_with(self, module: str) -> tuple[str, ...]:
        """Attention's first two projections are linears of their own here."""
        return () if f".{ATTENTION}." in module else super().fused_with(module)

    def check_fused(self, group: tuple[str, ...]) -> None:
        """Read per token, static shards need no common scale."""
        if self._section_type("quantize") != "w8a8_dynamic":
            super().check_fused(group)

    def mix_shared_routing(self, mlp: str) -> bool:
        """Whether the shared expert of an MoE layer can run with this option only."""
        return self.folder.type_of(f"{mlp}.{SHARED}.gate_proj") == W4A8_DYNAMIC

    def gate_bias(self, name: str) -> Tensor:
        """float32 [experts]: e_score_correction_bias as loaded, its minimum subtracted, which changes no choice."""
        bias = self.folder.tensor(name).float()
        return bias - bias.min()

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

    @property
    def _routed(self) -> int:
        return stated_number(self.folder.path / "config.json", self.folder.config, "n_routed_experts")


def open_mindie(folder: Path, ranks: int) -> MindieReader:
    """Raises FxquantError for a model_type under which MindIE looks for another model, and for other group sizes than
    it takes."""
    files = WeightFolder(folder, DESCRIPTION)
    if files.config.get("model_type") != MODEL_TYPE:
        fact = f"model_type is {files.config.get('model_type')}; MindIE runs DeepSeek as {MODEL_TYPE}."
        raise FxquantError(folder / "config.json", fact, f"Set it to {MODEL_TYPE}.")
    quantization = files.config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise FxquantError(folder / "config.json", "quantization_config is not a JSON object.", "Write it again.")
    merged = quantization | files.description  # the description's keys overrule those of config.json
    group_size = stated_number(folder / DESCRIPTION, merged, "group_size")
    if group_size not in GROUP_SIZES:
        fact = f"group_size {group_size}; MindIE takes {', '.join(map(str, GROUP_SIZES))}."
        raise FxquantError(folder / DESCRIPTION, fact, "Quantize with one of them.")
    if "group_size" not in files.description and group_size == 0:
        group_size = GROUP_SIZES[-1]  # without the key it asks for second scales
    return MindieReader("mindie", files, ranks, RULES, PackedExperts(files, ranks, group_size, by_name=True).load)
