"""Names of other conventions, and experts that transformers 5 has fused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, write_shards
from tiny_names import SPLITTABLE, assert_same, edit, folder_of, fuse_experts, name_pairs, write_parts
from torch import Tensor

from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.checkpoint.tensor_names import official_name, split_dimension
from fxquant.errors import FxquantError
from fxquant.storage.safetensors import TensorInfo

GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


# DeepSeek's names


def test_every_name_of_the_inference_code() -> None:
    pairs = list(name_pairs(layers=62))
    assert [official_name(theirs) for _, theirs, _ in pairs] == [official for official, _, _ in pairs]
    assert [split_dimension(official) for official, _, _ in pairs] == [dim for _, _, dim in pairs]


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attn.indexer.wq_b.weight",
        "layers.0.attn.wq_aa.weight",
        "layers.0.attn.wq_a.weight_scale_inv",
        "layers.0.ffn.gate.scale",
        "layers.0.ffn.gate.e_score_correction_bias",
        "layers.0.self_attn.q_a_proj.weight",
        "layers.x.attn.wq_a.weight",
        "weight",
        "",
    ],
)
def test_names_of_no_convention(name: str) -> None:
    assert official_name(name) is None


def test_names_of_no_convention_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"embed.weight": torch.ones(1), "layers.0.attn.indexer.wq_b.weight": torch.ones(1)})
    with pytest.raises(
        FxquantError, match=r"model\.safetensors: tensor layers\.0\.attn\.indexer\.wq_b\.weight has a n"
    ):
        open_checkpoint(folder)


def test_shards_with_an_index(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_folder(**SPLITTABLE, fp8=True)
    folder = write_parts(tmp_path, source, 1)
    write_shards(folder, load_file(folder / "model0-mp1.safetensors"), shards=3)
    assert_same(open_checkpoint(folder), open_checkpoint(source))


# fused experts


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_experts(tiny_folder: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    source = tiny_folder(dtype=dtype, moe_intermediate_size=384, num_nextn_predict_layers=1)
    fused = fuse_experts(load_file(source / "model.safetensors"))
    assert fused[GATE_UP].shape == (8, 2 * 384, 256) and fused[DOWN].shape == (8, 256, 384)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    write_shards(tmp_path, fused, shards)
    assert_same(open_checkpoint(tmp_path), open_checkpoint(source))


def test_opening_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorInfo, "read_bytes", None)
    assert len(open_checkpoint(folder_of(tmp_path, {GATE_UP: torch.ones(3, 4, 5)})).tensors) == 6


def test_a_model_of_transformers_5(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = tiny_config()
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config)).bfloat16()
    in_memory = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert {GATE_UP, DOWN} <= set(in_memory)
    model.save_pretrained(tmp_path / "saved")
    assert not {GATE_UP, DOWN} & set(load_file(tmp_path / "saved" / "model.safetensors"))
    built, saved = open_checkpoint(folder_of(tmp_path / "memory", in_memory)), open_checkpoint(tmp_path / "saved")
    assert sorted(built.tensors) == sorted(saved.tensors)
    assert all(torch.equal(built.read(name), saved.read(name)) for name in saved.tensors)


def test_fused_experts_in_fp8(tmp_path: Path) -> None:
    weight, scale = torch.ones(2, 4, 4).to(torch.float8_e4m3fn), torch.ones(2, 1, 1)
    folder = folder_of(tmp_path, {GATE_UP: weight, f"{GATE_UP}_scale_inv": scale})
    with pytest.raises(FxquantError, match=rf"model\.safetensors: {GATE_UP}: fused experts in FP8\. Save"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        (GATE_UP, torch.ones(2, 3, 4), r"\[2, 3, 4\], not \[experts, 2 x rows, columns\]"),
        (GATE_UP, torch.ones(2, 4), r"\[2, 4\], not \[experts, 2 x rows, columns\]"),
        (DOWN, torch.ones(2, 4), r"\[2, 4\], not \[experts, 1 x rows, columns\]"),
    ],
    ids=["odd", "flat gate and up", "flat down"],
)
def test_fused_experts_of_another_shape(tmp_path: Path, name: str, tensor: Tensor, shape: str) -> None:
    with pytest.raises(FxquantError, match=f"{name}: {shape}"):
        open_checkpoint(folder_of(tmp_path, {name: tensor}))


def test_experts_fused_and_apart(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {DOWN: torch.ones(2, 4, 4)})
    twice = DOWN.replace("down_proj", "1.down_proj.weight")
    edit(folder / "model.safetensors", **{twice: torch.ones(4, 4)})
    with pytest.raises(FxquantError, match=f"tensor {twice} is stored both fused and separate"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.x.down_proj", "experts.gate_up_projs"])
def test_other_tensors_are_left_as_they_are(tmp_path: Path, name: str) -> None:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text("{}")
    save_file({name: torch.ones(2, 4, 4)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == [name]
