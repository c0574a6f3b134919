"""Gates that mask groups with 0: published ones hold for correction biases of at least 0, which a checkpoint tells."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from fxquant.checkpoint.checkpoint import Checkpoint, HeldTensor
from fxquant.errors import FxquantError
from fxquant.frontend.gate_bias import check_biases
from fxquant.frontend.recognition.published import Version, nonnegative_bias, versions
from fxquant.frontend.source import open_source

MASKS_WITH_0 = Version("transformers", "DeepseekV3TopkRouter", "transformers 4.51 to 4.57", "", (), True)


def with_bias(checkpoint: Checkpoint, value: float) -> tuple[str, Checkpoint]:
    """The checkpoint with `value` as one element of its first gate's bias, which is 0.2 elsewhere."""
    name = next(name for name in checkpoint.tensors if name.endswith("e_score_correction_bias"))
    bias = torch.full(checkpoint.tensors[name].shape, 0.2)
    bias[1] = value
    return name, replace(checkpoint, tensors=checkpoint.tensors | {name: HeldTensor(name, bias)})


def test_a_negative_bias_is_refused_by_name(tiny: Callable[..., Checkpoint]) -> None:
    name, checkpoint = with_bias(tiny(), -0.125)
    program = open_source(tiny().folder).program()
    with pytest.raises(FxquantError) as refused:
        check_biases(program, checkpoint, MASKS_WITH_0)
    assert str(refused.value.place).endswith(name)
    assert "least correction bias is -0.125" in refused.value.fact
    assert "transformers 5.6 or later" in refused.value.remedy
    check_biases(program, checkpoint, None)  # a gate that masks with -inf takes any


@pytest.mark.parametrize("tensors", [True, False])
def test_others_are_not(tensors: bool, tiny: Callable[..., Checkpoint]) -> None:
    _, checkpoint = with_bias(tiny(), 0.0)
    program = open_source(tiny().folder).program()
    check_biases(program, checkpoint if tensors else replace(checkpoint, tensors={}), MASKS_WITH_0)


def test_versions_that_need_it() -> None:
    """Of transformers, what chooses: the gate of 4.51 to 4.57, the MoE of 5.0 to 5.5; the gate of remote code."""
    found = {(each.name, each.source.split(",")[0]) for each in versions() if each.nonnegative_bias}
    assert found == {
        ("DeepseekV3TopkRouter", "transformers 4.51 to 4.57"),
        ("DeepseekV3MoE", "transformers 5.0 to 5.5"),
        ("MoEGate", "deepseek-ai/DeepSeek-R1 on Hugging Face"),
    }
    assert nonnegative_bias(nn.Linear(1, 1)) is None
