"""Shared experts that an engine can run as one more routed expert, with the number after the last."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fxquant.engine_readers.folder import WeightFolder, stated_number
from fxquant.engine_readers.linear_loader import W4A8_DYNAMIC
from fxquant.engine_readers.names import ExpertPath, expert_path
from fxquant.engine_readers.ranks import Loaded
from fxquant.engine_readers.reader import EngineReader
from fxquant.errors import FxquantError

SHARED = "shared_experts"


@dataclass(frozen=True)
class SharedAsRoutedReader(EngineReader):
    """With the option mix_shared_routing the shared expert is stored in its own place, and runs with the routed ones.

    Only then is it of type W4A8_DYNAMIC: the engine refuses that type without the option, and other types with it.
    """

    def linear(self, module: str, row_parallel: bool = False) -> Loaded:
        routed = self.as_routed(module)
        return super().linear(module, row_parallel) if routed is None else self.expert_linear(routed, row_parallel)

    def as_routed(self, module: str) -> str | None:
        """The path of a projection of the shared expert as that of a routed one; None unless it runs so."""
        mlp, _, projection = module.rpartition(f".{SHARED}.")
        mixed = bool(mlp) and self.folder.type_of(module) == W4A8_DYNAMIC
        return f"{mlp}.experts.{self._routed}.{projection}" if mixed else None

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

    @property
    def _routed(self) -> int:
        return stated_number(self.folder.path / "config.json", self.folder.config, "n_routed_experts")


def open_model_type(
    folder: Path, description: str, engine: str, model_type: str
) -> tuple[WeightFolder, dict[str, Any]]:
    """The folder, and `quantization_config` of its config.json.

    Raises FxquantError for a model_type under which `engine` looks for another model.
    """
    files, place = WeightFolder(folder, description), folder / "config.json"
    stated = files.config.get("model_type")
    if stated != model_type:
        fact = f"model_type is {stated}; {engine} runs DeepSeek as {model_type}."
        raise FxquantError(place, fact, f"Set it to {model_type}.")
    quantization = files.config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise FxquantError(place, "quantization_config is not a JSON object.", "Write it again.")
    return files, quantization
