"""`fxquant compare`: policies for several targets on the same tokens."""

import json
from pathlib import Path

import pytest
import torch
from commands import Fxquant
from safetensors.torch import save_file
from tiny import write_checkpoint

from fxquant import compare
from fxquant.engines.table import Target

POLICY = "deepseek_w4a8_dynamic"
TARGETS = [Target.ASCEND, Target.VLLM_ASCEND]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    ids = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, folder / "ids.safetensors")
    return write_checkpoint(folder / "model", hidden_size=256, moe_intermediate_size=256)


def test_a_policy_for_two_targets_is_what_each_alone_gives(model: Path) -> None:
    ids = model.parent / "ids.safetensors"
    both = compare(model, [POLICY], ids, targets=TARGETS)
    assert list(both) == [f"{POLICY} for ascend", f"{POLICY} for vllm-ascend"]
    assert list(compare(model, [POLICY], ids, targets=TARGETS[:1])) == [POLICY]
    first, second = (compared.evaluation for compared in both.values())
    assert first.kl_difference is None and second.kl_difference == pytest.approx(second.kl_mean - first.kl_mean)
    low, high = second.intervals["kl_difference"]
    assert low <= second.kl_difference <= high


def test_the_command_prints_the_difference(model: Path, fxquant_: Fxquant) -> None:
    given = ("compare", model, "--text", model.parent / "ids.safetensors", "-p", POLICY)
    targets = [word for target in TARGETS for word in ("-t", target)]
    code, table, _ = fxquant_(*given, *targets, "-q")
    _, document, _ = fxquant_(*given, *targets, "--json")
    second = json.loads(document)[f"{POLICY} for vllm-ascend"]
    assert code == 0 and f"KL per token less that of {POLICY} for ascend, on the same tokens" in table
    assert f"{second['kl_difference']:+.5f}" in table
    assert " to ".join(f"{end:+.5f}" for end in second["intervals"]["kl_difference"]) in table
    assert "less that of" not in fxquant_(*given, "-q")[1]
