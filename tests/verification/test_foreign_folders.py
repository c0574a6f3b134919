"""Folders that others wrote: what the reference quantizer and its users publish is verified, and their edits are named.

Made of our own output, without our files and under the tool's names; the tool's own folders are in tests/conformance.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_edits import EDITS, EXPERT, config
from foreign_folders import SHAPE, UNPACKED, Published, edited, misses
from safetensors.torch import load_file, save_file

import fxquant
from fxquant import FxquantError
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.engines.table import Target
from fxquant.verification import Rebuild

Fixture = Callable[..., Path]


@pytest.mark.parametrize(
    ("policy", "target"),
    [
        ("groups", Target.ASCEND),
        ("groups", UNPACKED),
        ("static", Target.VLLM_ASCEND),
        ("clip", Target.ASCEND),
        ("m4", Target.ASCEND),
        ("flex", Target.VLLM_ASCEND),
    ],
)
def test_what_the_reference_tool_publishes_is_verified(
    policy: str, target: Target, published: Fixture, plain: Path
) -> None:
    report = fxquant.verify(published(policy, target), against=plain)
    assert misses(report) == []
    assert report.verdict == "verified"
    assert any(f"contract of {target}" in check.name for check in report.checks)


def test_ranges_are_listed_as_not_looked_at(published: Fixture, plain: Path) -> None:
    report = fxquant.verify(published(), against=plain)
    assert "no text says" in report.unread["input_scale, input_offset"]


def test_without_a_source_only_the_structure_is_checked(published: Fixture) -> None:
    report = fxquant.verify(published())
    assert (report.verdict, misses(report)) == ("structure only", [])


def test_a_smoothed_folder_says_what_is_smoothed(published: Fixture, plain: Path) -> None:
    report = fxquant.verify(published("m4"), against=plain)
    (worst,) = [check.worst for check in report.checks if check.name.startswith("quantized weights")]
    assert "values are smoothed" in worst


def test_codes_of_gptq_are_not_called_verified(published: Fixture, plain: Path) -> None:
    report = fxquant.verify(published("gptq", Target.VLLM_ASCEND), against=plain)
    assert misses(report) == []
    assert report.verdict == "partly verified"
    assert any(name.startswith("model.layers.1.mlp.experts.") and "GPTQ" in why for name, why in report.unread.items())


ROTATED = {"quarot": {"rotation_map": {"global_rotation": "optional/q.safetensors"}}}


@pytest.mark.parametrize(
    "optional, entry, said",
    [
        (ROTATED, 1.0, None),
        (ROTATED, 1.01, "is no rotation"),
        (ROTATED, float("nan"), "is no rotation"),
        (ROTATED, None, "is no file of the folder"),
        ({"quarot": {"rotation_map": {"global_rotation": "../q.safetensors"}}}, 1.0, "is no file of the folder"),
        ({"quarot": {"rotation_map": {"global_rotation": 7}}}, 1.0, "names no file"),
        ({"quarot": {"rotation_map": []}}, 1.0, "names no file"),
        ({"quarot": []}, 1.0, "names no file"),
    ],
)
def test_weights_that_are_said_to_be_rotated_need_a_rotation(
    optional: dict, entry: float | None, said: str | None, published: Fixture, plain: Path, tmp_path: Path
) -> None:
    """With one they are not compared, and that is said."""

    def rotate(it: Published) -> None:
        it.description["optional"] = optional

    out = edited(published("static", Target.VLLM_ASCEND), tmp_path / "it", rotate)
    if entry is not None:
        (out / "optional").mkdir(exist_ok=True)
        matrix = torch.eye(open_checkpoint(plain).config["hidden_size"])
        matrix[0, 0] = entry
        save_file({"global_rotation": matrix}, out / "optional" / "q.safetensors")
    report = fxquant.verify(out, against=plain)
    assert report.verdict == ("FAILED" if said else "partly verified")
    assert "rotated" in report.unread["weights"]
    assert [said in miss for miss in misses(report)] == [True] if said else misses(report) == []


def test_int4_per_channel_states_its_group_size(published: Fixture, plain: Path, tmp_path: Path) -> None:
    """Releases take 256 where it is missing, and compare null with 0."""
    for value in (None, "absent"):

        def edit(it: Published, value: object = value) -> None:
            it.description["group_size"] = value
            if value == "absent":
                del it.description["group_size"]

        out = edited(published("static", Target.VLLM_ASCEND), tmp_path / str(value), edit)
        found = misses(fxquant.verify(out, against=plain, target=Target.VLLM_ASCEND))
        assert any("group_size is missing" in miss for miss in found), found


def test_a_folder_that_lacks_its_weights_or_entries_says_so(published: Fixture, tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(FxquantError) as caught:
            fxquant.verify(out)
        return str(caught.value)

    out = Path(shutil.copytree(published("static", Target.VLLM_ASCEND), tmp_path / "out"))
    for text in ("[]", "{}", "0"):
        (out / "quant_model_description.json").write_text(text)
        assert "no entry says what a tensor is" in refusal()
    for file in out.glob("*.safetensors"):
        file.unlink()
    assert "has no *.safetensors; " in refusal()


def test_scales_between_up_and_down_of_an_expert_are_seen(published: Fixture, plain: Path, tmp_path: Path) -> None:
    """up / s and down * s compute the same; only both together are the source's."""
    model = Path(shutil.copytree(plain, tmp_path / "smoothed"))
    tensors = load_file(model / "model.safetensors")
    up, down = (f"model.layers.1.mlp.experts.1.{name}_proj.weight" for name in ("up", "down"))
    scale = 2.0 ** torch.randint(-2, 3, (len(tensors[up]),), generator=torch.Generator().manual_seed(0))
    tensors[up] = (tensors[up].float() / scale[:, None]).bfloat16()
    tensors[down] = (tensors[down].float() * scale).bfloat16()
    save_file(tensors, model / "model.safetensors")
    out = published("static", Target.VLLM_ASCEND, model)
    assert misses(fxquant.verify(out, against=plain)) == []
    tensors[down] = load_file(plain / "model.safetensors")[down]
    save_file(tensors, model / "model.safetensors")
    alone = published("static", Target.VLLM_ASCEND, Path(shutil.copytree(model, tmp_path / "one_side")))
    assert any(down in miss for miss in misses(fxquant.verify(alone, against=plain)))


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1])
@pytest.mark.parametrize("role", ["weight_scale", "weight_scale_second"])
def test_clipping_hides_no_wrong_scale(
    role: str, factor: float, published: Fixture, plain: Path, tmp_path: Path
) -> None:
    """Less than half of what stands there clips too, but does not pay."""
    name = f"{EXPERT}.{role}"

    def edit(it: Published) -> None:
        scale = factor * it.tensors[name]
        it.tensors[name] = scale.round() if role == "weight_scale_second" else scale

    found = misses(fxquant.verify(edited(published("clip"), tmp_path / "edited", edit), against=plain))
    assert any(f"{EXPERT}.weight: " in miss for miss in found), found


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_named(name: str, published: Fixture, plain: Path, tmp_path: Path) -> None:
    edit, named = EDITS[name]
    report = fxquant.verify(edited(published(), tmp_path / "edited", edit), against=plain, target=Target.ASCEND)
    assert report.verdict == "FAILED"
    assert any(named in miss for miss in misses(report)), misses(report)


def test_weights_of_another_model_are_named(published: Fixture, tiny_folder: Fixture) -> None:
    found = misses(fxquant.verify(published(), against=tiny_folder(seed=1, **SHAPE)))
    assert sum("elements are beyond it" in miss for miss in found) > 10


def test_an_unpacked_folder_renamed_by_hand_is_named(published: Fixture, plain: Path, tmp_path: Path) -> None:
    """As a report on vllm-ascend (#2296) tells: the description renamed, group_size added, model_type put back."""

    def by_hand(it: Published) -> Callable[[], object]:
        it.description |= {"version": "1.0.0", "group_size": 32}
        it.config["model_type"] = "deepseek_v3"
        return lambda: it.described.rename(it.path / "quant_model_description.json")

    out = edited(published("groups", UNPACKED), tmp_path / "by_hand", by_hand)
    found = misses(fxquant.verify(out, against=plain, target=Target.ASCEND))
    assert any(f"unpacked, one to a byte, without scale_bias, the form of {UNPACKED}" in miss for miss in found), found


def test_a_dialect_of_another_engine_is_named(published: Fixture, plain: Path) -> None:
    found = misses(fxquant.verify(published(), against=plain, target=Target.VLLM_ASCEND))
    assert any("vllm-ascend reads int4 packed and per channel" in miss for miss in found), found


@pytest.mark.parametrize(
    "keys", [{"moe_quantize": "w8a8_dynamic"}, {"moe_quantize": None}, {"mla_quantize": "w8a8_mix"}]
)
def test_a_section_of_config_json_that_contradicts_the_tensors_is_named(
    keys: dict[str, Any], published: Fixture, plain: Path, tmp_path: Path
) -> None:
    out = edited(published("groups", Target.MINDIE), tmp_path / "edited", config(**keys))
    found = misses(fxquant.verify(out, against=plain, target=Target.MINDIE))
    assert any(f"config.json: {next(iter(keys))}: " in miss for miss in found), found


def test_rebuilding_is_refused(published: Fixture, plain: Path) -> None:
    with pytest.raises(FxquantError, match="was not written by fxquant"):
        fxquant.verify(published(), against=plain, rebuild=Rebuild(None))


def test_a_folder_without_config_json_needs_the_source(published: Fixture, tmp_path: Path) -> None:
    out = edited(published(), tmp_path / "bare", lambda it: (it.path / "config.json").unlink)
    with pytest.raises(FxquantError, match="no config.json to say what the model is"):
        fxquant.verify(out)
