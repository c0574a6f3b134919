"""Folders that others wrote, converted: their integers in another form, with graph and manifest, verified so."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_folders import UNPACKED, Published, edited, misses
from safetensors.torch import load_file

import fxquant
from fxquant import FxquantError
from fxquant.api import open_output
from fxquant.engines.table import Target
from fxquant.lowering.output_folder.manifest import MANIFEST, read_manifest
from fxquant.ops.quantized import expand_int4

EXPERT = "model.layers.1.mlp.experts.1.down_proj"
Fixture = Callable[..., Path]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_unpacked_codes_are_packed_and_get_their_scale_bias(published: Fixture, plain: Path, tmp_path: Path) -> None:
    before = published("groups", UNPACKED)
    out = tmp_path / "packed"
    report = fxquant.convert(before, Target.ASCEND, out, against=plain, export=False)
    assert report.verification is not None and report.verification.verdict == "verified"
    stored = tensors(out)
    assert torch.equal(expand_int4(stored[f"{EXPERT}.weight"], None), tensors(before)[f"{EXPERT}.weight"])
    direct = tensors(published("groups", Target.ASCEND))
    assert torch.equal(stored[f"{EXPERT}.scale_bias"], direct[f"{EXPERT}.scale_bias"])


@pytest.mark.parametrize("policy", ["groups", "m4"])
def test_the_same_target_adds_graph_and_manifest(policy: str, published: Fixture, plain: Path, tmp_path: Path) -> None:
    before, out = published(policy), tmp_path / "ours"
    report = fxquant.convert(before, Target.ASCEND, out, against=plain, export=False)
    assert report.verification is not None and report.verification.verdict == "verified"
    ours, theirs = tensors(out), tensors(before)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_manifest(out).foreign
    assert misses(fxquant.verify(out)) == []  # again, from the manifest alone
    assert (out / "model_ascend.py").is_file()


def test_what_is_converted_can_be_evaluated(published: Fixture, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours"
    fxquant.convert(published("static", Target.VLLM_ASCEND), Target.SGLANG_NPU, out, against=plain, export=False)
    program, read = open_output(out)
    assert program.recipes and read("model.norm.weight").dtype is torch.float32


def test_a_damaged_conversion_is_named(published: Fixture, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours"
    fxquant.convert(published(), Target.ASCEND, out, against=plain, export=False, verify=False)
    (file,) = out.glob("*.safetensors")
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 0x11]))
    assert any("files: digest" in miss for miss in misses(fxquant.verify(out)))


def test_without_its_model_the_config_says_what_it_is(published: Fixture, tmp_path: Path) -> None:
    out = tmp_path / "ours"
    report = fxquant.convert(published(), Target.ASCEND, out, export=False)
    assert report.verification is not None and report.verification.verdict == "structure only"
    assert fxquant.verify(out).verdict == "structure only"


def test_groups_do_not_go_where_there_are_none(published: Fixture, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="second scales have no place.*Quantize the model again for vllm-ascend"):
        fxquant.convert(published(), Target.VLLM_ASCEND, tmp_path / "out", against=plain)
    assert not (tmp_path / "out").exists()


def test_a_contradiction_is_refused_before_anything_is_written(published: Fixture, plain: Path, tmp_path: Path) -> None:
    def drop(it: Published) -> None:
        del it.tensors[f"{EXPERT}.scale_bias"]

    folder = edited(published(), tmp_path / "edited", drop)
    with pytest.raises(FxquantError, match=f"{EXPERT}.scale_bias is missing(.|\\n)*fxquant verify"):
        fxquant.convert(folder, Target.ASCEND, tmp_path / "out", against=plain)
    assert not (tmp_path / "out").exists()


def test_a_model_given_for_an_output_of_ours_is_refused(published: Fixture, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours"
    fxquant.convert(published(), Target.ASCEND, out, against=plain, export=False, verify=False)
    with pytest.raises(FxquantError, match="applies only to folders that others wrote"):
        fxquant.convert(out, Target.ASCEND, tmp_path / "again", against=plain)


def test_the_command_takes_the_model_by_both_names(
    published: Fixture, plain: Path, tmp_path: Path, fxquant_: Callable
) -> None:
    for number, option in enumerate(("--against", "--source")):
        out = tmp_path / f"out{number}"
        fxquant_("convert", published(), "--target", "ascend", option, plain, "-o", out, "--no-export", "--quiet")
        assert (out / MANIFEST).is_file()
    assert json.loads((tmp_path / "out0" / MANIFEST).read_text())["foreign"] is True
