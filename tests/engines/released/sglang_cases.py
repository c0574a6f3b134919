"""Folders to show to released SGLang, compiled whatever our contract says, and the runs of a release on them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from released import unpacked
from safetensors.torch import save_file
from tiny import write_checkpoint

import fxquant
from fxquant import CompileOptions
from fxquant.compilation.options import MtpMode
from fxquant.engines.table import Target

RELEASES = ("0.5.9", "0.5.14", "0.5.23")
MSGSPEC = "0.20.0"
"""0.5.23 keeps its configuration in structs of this package."""
PROCESS = Path(__file__).parent / "sglang_process.py"
SUPPORT = Path(__file__).parents[2] / "support"

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2, "num_nextn_predict_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 16,
    "n_routed_experts": 16, "moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
}  # fmt: skip
"""Divides over 16 ranks; the last three keys are in every published config, and SGLang asks for them."""
SOURCES: dict[str, dict[str, Any]] = {
    "bf16": {}, "fp16": {"dtype": torch.float16}, "fp8": {"fp8": True}, "biased": {"attention_bias": True},
}  # fmt: skip

PER_CHANNEL, STATIC = "deepseek_w4a8_per_channel", "deepseek_w4a8_per_channel_static"
_FLOAT_KV_B = '{kind: attention, path: "*.kv_b_proj", scheme: FLOAT, why: inference absorbs it}'
OWN_POLICIES = {
    "static_everywhere": [
        _FLOAT_KV_B, "{kind: [attention, dense_mlp, shared_expert], scheme: W8A8}"
    ],
    "shifted": [_FLOAT_KV_B, "{kind: attention, scheme: W8A8}"],
    "mixed_attention": [_FLOAT_KV_B, "{kind: attention, scheme: W8A8_MIX}"],
    "mixed_mlp": ["{kind: dense_mlp, scheme: W8A8_MIX}"],
    "int4_dense": ["{kind: dense_mlp, scheme: W4A8_DYNAMIC, group_size: 0}"],
    "int4_shared": ["{kind: shared_expert, scheme: W4A8_DYNAMIC, group_size: 0}"],
    "int4_attention": ['{kind: attention, path: "*.o_proj", scheme: W4A8_DYNAMIC, group_size: 0}'],
    "int8_kv_b": ['{kind: attention, path: "*.kv_b_proj", scheme: W8A8_DYNAMIC}'],
    "static_kv_b": ['{kind: attention, path: "*.kv_b_proj", scheme: W8A8}'],
    "float_attention": ["{kind: attention, scheme: FLOAT}"],
    "float_dense": ["{kind: [dense_mlp, shared_expert], scheme: FLOAT}"],
    "float_experts": ["{kind: routed_expert, scheme: FLOAT}"],
    "int8_experts": ["{kind: routed_expert, scheme: W8A8_DYNAMIC}"],
    "groups_of_256": ["{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 256}"],
    "groups_of_128": ["{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 128}"],
    "int8_head": ["{kind: head, scheme: W8A8_DYNAMIC}"],
}  # fmt: skip
"""Each: what it changes of deepseek_w4a8_per_channel, to ask for one cell of the contract."""


SHIFTED = "smooth: [{kind: attention, method: m4, alpha: 0.5}]\nnorm_bias: every\n"
"""Of "shifted": a bias beside every norm, and of every linear that reads a shifted one."""


@dataclass(frozen=True)
class Case:
    """A folder on ranks: "tp" splits experts over them, "ep" keeps them whole.

    draft      the multi-token-prediction layer in place of the model
    truth      the folder that `folder` is a damaged copy of; empty: itself
    quantized  served with --quantization modelslim; a float draft with --speculative-draft-model-quantization unquant
    """

    folder: str
    ranks: int = 1
    parallel: str = "tp"
    draft: bool = False
    quantized: bool = True
    truth: str = ""


class Folders:
    """Compiled folders by policy, source and mode of multi-token prediction, once each, in `place`."""

    def __init__(self, place: Path) -> None:
        self._place = place
        place.mkdir(parents=True, exist_ok=True)
        self._ids = place / "ids.safetensors"
        save_file({"ids": torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))}, self._ids)

    def get(self, policy: str, source: str = "bf16", mtp: str = "none") -> Path:
        """The folder."""
        out = self._place / f"{policy}-{source}-{mtp}"
        if not out.exists():
            options = CompileOptions(
                policy=self._policy(policy), target=Target.SGLANG_NPU, out=out, calib=self._ids, mtp=MtpMode(mtp),
                verify=False, export=False,
            )  # fmt: skip
            with patch("fxquant.passes.check_contract.refusal", return_value=None):
                fxquant.compile(self._source(source), options)
        return out

    def _source(self, source: str) -> Path:
        folder = self._place / f"source-{source}"
        return folder if folder.exists() else write_checkpoint(folder, **(SHAPE | SOURCES[source]))

    def _policy(self, policy: str) -> str:
        if policy not in OWN_POLICIES:
            return policy
        file = self._place / f"{policy}.yaml"
        rules = "\n".join(f"  - {rule}" for rule in OWN_POLICIES[policy])
        smooth = SHIFTED if policy == "shifted" else ""
        file.write_text(f"extends: {PER_CHANNEL}\n{smooth}rules:\n{rules}\n", encoding="utf-8")
        return str(file)


def run(release: str, cases: Iterable[Case], findings: Path) -> list[dict[str, Any]]:
    """What a release does with each case: see `Finding` of sglang_process.py."""
    packages = [unpacked("sglang", release), unpacked("msgspec", MSGSPEC)]
    done = subprocess.run(
        [sys.executable, str(PROCESS), str(findings), *map(str, packages)],
        input=json.dumps([asdict(case) for case in cases]), text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(findings.read_text(encoding="utf-8"))
