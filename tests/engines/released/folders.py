"""Folders that the engines are fed: a model whose sizes 16 ranks can share, by every policy, and what goes with it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from tiny import write_checkpoint

import fxquant
from fxquant import CompileOptions, FxquantError
from fxquant.engines.table import Target
from fxquant.policy.policy import shipped_policies

SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 1024, "num_attention_heads": 16,
    "num_key_value_heads": 16, "n_routed_experts": 16, "num_nextn_predict_layers": 1,
}  # fmt: skip
"""Groups of 256: one of gate_proj's k, four of down_proj's. On 16 ranks down_proj has 64 features, an expert each."""
TARGETS = (Target.ASCEND, Target.VLLM_ASCEND)


@dataclass(frozen=True)
class Source:
    """A checkpoint, one policy, one target; `mtp`: what becomes of the multi-token prediction layer."""

    policy: str
    target: Target
    mtp: str = "none"
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As rows of the matrix are called."""
        notes = [*(["mtp " + self.mtp] if self.mtp != "none" else []), *(_note(*item) for item in self.model.items())]
        return f"{self.policy} for {self.target}" + (f" ({', '.join(notes)})" if notes else "")


def _note(option: str, value: Any) -> str:
    return "FP8 source" if option == "fp8" else str(value).removeprefix("torch.")


def sources() -> Iterator[Source]:
    """Every shipped policy for both targets; of two policies, dtypes of the source and multi-token prediction too."""
    for policy in shipped_policies():
        for target in TARGETS:
            yield Source(policy, target)
    for policy, target in (
        ("deepseek_w4a8", Target.ASCEND),
        ("deepseek_w4a8_per_channel_static", Target.VLLM_ASCEND),
    ):
        yield Source(policy, target, model={"dtype": torch.float16})
        yield Source(policy, target, model={"fp8": True})
        yield Source(policy, target, mtp="float")
        yield Source(policy, target, mtp="quant")
    yield Source("deepseek_w8a8_mix", Target.VLLM_ASCEND, mtp="quant")


def compiled(source: Source, root: Path) -> Path | FxquantError:
    """The folder, or what fxquant says instead of making it."""
    checkpoint = root / ("model " + " ".join(f"{option} {value}" for option, value in source.model.items()))
    if not checkpoint.exists():
        write_checkpoint(checkpoint, **SHAPE, **source.model)
    tokens, out = root / "ids.safetensors", root / source.name
    if not tokens.exists():
        save_file({"ids": torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))}, tokens)
    options = CompileOptions(
        policy=source.policy, target=source.target, out=out, calib=tokens, mtp=source.mtp, verify=False
    )
    try:
        with patch("fxquant.lowering.output.write_exported"):  # .pt2 files cost seconds, and no engine reads them
            fxquant.compile(checkpoint, options)
    except FxquantError as error:
        return error
    return out
