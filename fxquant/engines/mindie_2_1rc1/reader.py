"""MindIE 2.1.RC1 and earlier: experts with one int4 per int8, group scales rounded into float16, no scale_bias.

Source: msModelSlim's `--mindie_format` and its README. Nobody has held it against such a release.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from fxquant.engine_readers.folder import WeightFolder, stated_number
from fxquant.engine_readers.linear_loader import W4A8_DYNAMIC, LinearRules
from fxquant.engine_readers.names import ExpertPath, expert_path
from fxquant.engine_readers.ranks import Loaded
from fxquant.engine_readers.reader import EngineReader
from fxquant.engine_readers.unpacked_experts import load_unpacked
from fxquant.errors import FxquantError

DESCRIPTION = "quant_model_description_w8a8_dynamic.json"
MODEL_TYPE = "deepseekv2"
SHARED = "shared_experts"

RULES = LinearRules(reciprocal=False, narrow_scale=False, biased=True)
"""MindIE is not known to use a reciprocal or a narrower weight_scale; deq_scale stays float32 for bfloat16."""


@dataclass(frozen=True)
class UnpackedReader(EngineReader):
    """With mix_shared_routing the shared expert runs as one more routed expert, with the number after the last.

    Only then is it of type W4A8_DYNAMIC: MindIE refuses that type without the option, and other types with it.
    """

    def linear(self, module: str, row_parallel: bool = False) -> Loaded:
        mlp, _, projection = module.rpartition(f".{SHARED}.")
        if mlp and self.folder.type_of(module) == W4A8_DYNAMIC:
            return self.expert_linear(f"{mlp}.experts.{self._routed}.{projection}", row_parallel)
        return super().linear(module, row_parallel)

    def locate(self, module: str) -> ExpertPath:
        """The expert after the last routed one is stored under shared_experts; all its projections are W4A8_DYNAMIC."""
        path = expert_path(module)
        if path.index != self._routed:
            return path
        path = replace(path, stored=f"{path.parent.removesuffix('.experts')}.{SHARED}")
        kind = self.folder.type_of(path.module(path.projection))
        if kind != W4A8_DYNAMIC:
            fact = f"{kind}; with mix_shared_routing it runs with the routed experts."
            raise FxquantError(path.module(path.projection), fact, "Give it W4A8_DYNAMIC, or switch the option off.")
        return path

    def mix_shared_routing(self, mlp: str) -> bool:
        """Whether the shared expert of an MoE layer can run with this option only."""
        return self.folder.type_of(f"{mlp}.{SHARED}.gate_proj") == W4A8_DYNAMIC

    def gate_bias(self, name: str) -> Tensor:
        """float32 [experts]: e_score_correction_bias as loaded, its minimum subtracted, which changes no choice."""
        bias = self.folder.tensor(name).float()
        return bias - bias.min()

    def norm(self, module: str) -> tuple[Tensor, Tensor | None]:
        """weight and bias of a norm; the bias is allocated, and then required, if the description names it."""
        described = f"{module}.bias" in self.folder.description
        bias = self.folder.tensor(f"{module}.bias") if described else None
        return self.folder.tensor(f"{module}.weight"), bias

    @property
    def _routed(self) -> int:
        return stated_number(self.folder.path / "config.json", self.folder.config, "n_routed_experts")


def open_mindie_2_1rc1(folder: Path, ranks: int) -> UnpackedReader:
    """Raises FxquantError for a model_type under which MindIE looks for another model."""
    files = WeightFolder(folder, DESCRIPTION)
    if files.config.get("model_type") != MODEL_TYPE:
        fact = f"model_type is {files.config.get('model_type')}; MindIE runs DeepSeek as {MODEL_TYPE}."
        raise FxquantError(folder / "config.json", fact, f"Set it to {MODEL_TYPE}.")
    quantization = files.config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise FxquantError(folder / "config.json", "quantization_config is not a JSON object.", "Write it again.")
    stated = quantization.get("group_size")
    group_size = None if stated is None else stated_number(folder / "config.json", quantization, "group_size")
    load = partial(load_unpacked, files, ranks=ranks, group_size=group_size)
    return UnpackedReader("mindie-2.1rc1", files, ranks, RULES, load)
