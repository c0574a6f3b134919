"""Rotary frequencies that old checkpoints store: left out where they are the model's, an error where they are not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import YARN, float_program, meta_model, write_checkpoint
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.checkpoint.config import parse_config
from fxquant.compilation.ledger import Bucket, build_ledger
from fxquant.errors import FxquantError
from fxquant.models import rotary
from fxquant.passes import AssignMtp, AssignSchemes
from fxquant.policy.policy import MtpMode, load_policy
from fxquant.program.program import Program
from fxquant.schemes.weight_formats import WeightFormat

LAYER = "model.layers.1.self_attn.rotary_emb.inv_freq"
MTP_LAYER = "model.layers.2.self_attn.rotary_emb.inv_freq"
Change = Callable[[Tensor], Tensor]


def stored_with(folder: Path, names: list[str], change: Change, **options: object) -> Checkpoint:
    """A tiny checkpoint that stores its frequencies, changed, under `names`."""
    write_checkpoint(folder, num_nextn_predict_layers=1, **options)  # type: ignore[arg-type]
    config = parse_config(open_checkpoint(folder).config, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: change(torch.tensor(rotary.frequencies(config))) for name in names}
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def assigned(checkpoint: Checkpoint, mode: MtpMode = MtpMode.NONE) -> Program:
    """Its float graph with rules and recipes, as a plan sees it."""
    program, policy = float_program(checkpoint), load_policy("deepseek_w4a8").with_mtp(mode)
    AssignSchemes(policy, meta_model(checkpoint).mtp_modules())(program)
    config = parse_config(checkpoint.config, checkpoint.folder)
    AssignMtp(policy, config, checkpoint, lambda group_size: WeightFormat.PACKED)(program)
    return program


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"rope_scaling": YARN}], ids=["plain", "yarn"])
def test_frequencies_of_the_config_are_left_out(tmp_path: Path, dtype: torch.dtype, options: dict[str, object]) -> None:
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", LAYER, MTP_LAYER, "model.rotary_emb.inv_freq"]
    checkpoint = stored_with(tmp_path, names, lambda value: value.to(dtype), **options)
    entries = {entry.name: entry for entry in build_ledger(assigned(checkpoint), checkpoint).entries}
    for name in names:
        assert entries[name].bucket is Bucket.LEFT_OUT
        assert entries[name].why == "rotary frequencies, which config.json gives"
        assert entries[name].nbytes == checkpoint.tensors[name].nbytes


@pytest.mark.parametrize("mode", [MtpMode.FLOAT, MtpMode.QUANT])
def test_a_prediction_layer_that_is_stored_goes_without(mode: MtpMode, tmp_path: Path) -> None:
    checkpoint = stored_with(tmp_path, [MTP_LAYER], lambda value: value)
    program = assigned(checkpoint, mode)
    assert MTP_LAYER not in program.mtp.float_tensors
    entry = next(candidate for candidate in build_ledger(program, checkpoint).entries if candidate.name == MTP_LAYER)
    assert entry.bucket is Bucket.LEFT_OUT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value * 1.001, r"has frequency 1\.001 at 0, config.json gives 1\."),
        (lambda value: value.flip(0), "has frequency .* at 0"),
        (lambda value: value[:-1], r"torch.float32\[3\], config.json gives 4 frequencies"),
        (lambda value: value.to(torch.int32), "torch.int32"),
        (lambda value: value * float("nan"), "has frequency nan"),
    ],
    ids=["another base", "another order", "another size", "integers", "no number"],
)
def test_other_frequencies_are_an_error(tmp_path: Path, change: Change, message: str) -> None:
    checkpoint = stored_with(tmp_path, [LAYER], change)
    with pytest.raises(FxquantError, match=rf"tensor {LAYER} .*{message}"):
        build_ledger(assigned(checkpoint), checkpoint)


@pytest.mark.parametrize("name", ["model.layers.7.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"])
def test_frequencies_of_no_module_belong_nowhere(name: str, tmp_path: Path) -> None:
    checkpoint = stored_with(tmp_path, [name], lambda value: value)
    with pytest.raises(FxquantError, match=f"tensor {name} belongs to no parameter"):
        build_ledger(assigned(checkpoint), checkpoint)
