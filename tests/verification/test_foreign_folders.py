"""Folders that others wrote: what the reference quantizer and its users publish is verified, and their edits are named.

Made of our own output, without our files and under the tool's names; the tool's own folders are in tests/conformance.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_edits import EDITS, config
from foreign_folders import UNPACKED, Published, edited, publish
from safetensors.torch import load_file, save_file

import fxquant
from fxquant import CompileOptions, FxquantError
from fxquant.engines.table import Target
from fxquant.verification import Rebuild, VerifyReport

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 128, "n_routed_experts": 2, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
GROUPS = "[{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 32}]"
POLICIES = {
    "groups": f"description: two levels\nextends: deepseek_w4a8\nrules: {GROUPS}\n",
    "m4": f"description: as the W4A8 script smooths\nextends: deepseek_w4a8_msmodelslim_m4\nrules: {GROUPS}\n",
    "flex": (
        "description: scales alone\nextends: deepseek_w4a8_per_channel\nsmooth: [{kind: attention, method: flex}]\n"
    ),
    "gptq": (
        "description: codes of GPTQ\nextends: deepseek_w4a8_per_channel\n"
        "rules: [{kind: routed_expert, scheme: W4A8_DYNAMIC, algorithm: gptq}]\n"
    ),
    "static": "deepseek_w4a8_per_channel_static",
}
Fixture = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tiny_folder: Fixture) -> Path:
    return tiny_folder(**SHAPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Fixture:
    """`folder("groups", Target.ASCEND)`: that policy's output for that target, published."""
    place = tmp_path_factory.mktemp("published")
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, place / "ids.safetensors")
    made: dict[str, Path] = {}

    def get(policy: str = "groups", target: Target = Target.ASCEND, model: Path = source) -> Path:
        key = f"{policy}-{target}-{model.name}"
        if key not in made:
            text = POLICIES[policy]
            name = text
            if "\n" in text:
                name = str(place / f"{policy}.yaml")
                Path(name).write_text(text)
            out = place / f"compiled-{key}"
            options = CompileOptions(
                policy=name, target=target, out=out, calib=place / "ids.safetensors", verify=False, export=False
            )
            fxquant.compile(model, options)
            made[key] = publish(out, place / key)
        return made[key]

    return get


def misses(report: VerifyReport) -> list[str]:
    return [f"{check.name}: {miss}" for check in report.checks for miss in check.misses]


@pytest.mark.parametrize(
    ("policy", "target"),
    [
        ("groups", Target.ASCEND),
        ("groups", UNPACKED),
        ("static", Target.VLLM_ASCEND),
        ("m4", Target.ASCEND),
        ("flex", Target.VLLM_ASCEND),
    ],
)
def test_what_the_reference_tool_publishes_is_verified(
    policy: str, target: Target, folder: Fixture, source: Path
) -> None:
    report = fxquant.verify(folder(policy, target), against=source)
    assert misses(report) == []
    assert report.verdict == "verified"
    assert any(f"contract of {target}" in check.name for check in report.checks)


def test_ranges_are_listed_as_not_looked_at(folder: Fixture, source: Path) -> None:
    report = fxquant.verify(folder(), against=source)
    assert "no text says" in report.unread["input_scale, input_offset"]


def test_without_a_source_only_the_structure_is_checked(folder: Fixture) -> None:
    report = fxquant.verify(folder())
    assert (report.verdict, misses(report)) == ("structure only", [])


def test_a_smoothed_folder_says_what_is_smoothed(folder: Fixture, source: Path) -> None:
    report = fxquant.verify(folder("m4"), against=source)
    (worst,) = [check.worst for check in report.checks if check.name.startswith("quantized weights")]
    assert "values are smoothed" in worst


def test_codes_of_gptq_are_not_called_verified(folder: Fixture, source: Path) -> None:
    report = fxquant.verify(folder("gptq", Target.VLLM_ASCEND), against=source)
    assert misses(report) == []
    assert report.verdict == "partly verified"
    assert any(name.startswith("model.layers.1.mlp.experts.") and "GPTQ" in why for name, why in report.unread.items())


def test_a_folder_that_says_that_it_is_rotated_is_not_compared(folder: Fixture, source: Path, tmp_path: Path) -> None:
    def rotate(published: Published) -> None:
        published.description["optional"] = {"quarot": {"rotation_map": {}}}

    report = fxquant.verify(edited(folder("static", Target.VLLM_ASCEND), tmp_path / "it", rotate), against=source)
    assert report.verdict == "partly verified"
    assert "rotated" in report.unread["weights"]


def test_scales_between_up_and_down_of_an_expert_are_seen(folder: Fixture, source: Path, tmp_path: Path) -> None:
    """up / s and down * s compute the same; only both together are the source's."""
    model = Path(shutil.copytree(source, tmp_path / "smoothed"))
    tensors = load_file(model / "model.safetensors")
    up, down = (f"model.layers.1.mlp.experts.1.{name}_proj.weight" for name in ("up", "down"))
    scale = 2.0 ** torch.randint(-2, 3, (len(tensors[up]),), generator=torch.Generator().manual_seed(0))
    tensors[up] = (tensors[up].float() / scale[:, None]).bfloat16()
    tensors[down] = (tensors[down].float() * scale).bfloat16()
    save_file(tensors, model / "model.safetensors")
    published = folder("static", Target.VLLM_ASCEND, model)
    assert misses(fxquant.verify(published, against=source)) == []
    tensors[down] = load_file(source / "model.safetensors")[down]
    save_file(tensors, model / "model.safetensors")
    alone = folder("static", Target.VLLM_ASCEND, Path(shutil.copytree(model, tmp_path / "one_side")))
    assert any(down in miss for miss in misses(fxquant.verify(alone, against=source)))


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_named(name: str, folder: Fixture, source: Path, tmp_path: Path) -> None:
    edit, named = EDITS[name]
    report = fxquant.verify(edited(folder(), tmp_path / "edited", edit), against=source, target=Target.ASCEND)
    assert report.verdict == "FAILED"
    assert any(named in miss for miss in misses(report)), misses(report)


def test_weights_of_another_model_are_named(folder: Fixture, tiny_folder: Fixture) -> None:
    found = misses(fxquant.verify(folder(), against=tiny_folder(seed=1, **SHAPE)))
    assert sum("elements are beyond it" in miss for miss in found) > 10


def test_an_unpacked_folder_renamed_by_hand_is_named(folder: Fixture, source: Path, tmp_path: Path) -> None:
    """As a report on vllm-ascend (#2296) tells: the description renamed, group_size added, model_type put back."""

    def by_hand(published: Published) -> Callable[[], object]:
        published.description |= {"version": "1.0.0", "group_size": 32}
        published.config["model_type"] = "deepseek_v3"
        return lambda: published.described.rename(published.path / "quant_model_description.json")

    out = edited(folder("groups", UNPACKED), tmp_path / "by_hand", by_hand)
    found = misses(fxquant.verify(out, against=source, target=Target.ASCEND))
    assert any(f"unpacked, one to a byte, without scale_bias, the form of {UNPACKED}" in miss for miss in found), found


def test_a_dialect_of_another_engine_is_named(folder: Fixture, source: Path) -> None:
    found = misses(fxquant.verify(folder(), against=source, target=Target.VLLM_ASCEND))
    assert any("vllm-ascend reads int4 packed and per channel" in miss for miss in found), found


@pytest.mark.parametrize(
    "keys", [{"moe_quantize": "w8a8_dynamic"}, {"moe_quantize": None}, {"mla_quantize": "w8a8_mix"}]
)
def test_a_section_of_config_json_that_contradicts_the_tensors_is_named(
    keys: dict[str, Any], folder: Fixture, source: Path, tmp_path: Path
) -> None:
    out = edited(folder("groups", Target.MINDIE), tmp_path / "edited", config(**keys))
    found = misses(fxquant.verify(out, against=source, target=Target.MINDIE))
    assert any(f"config.json: {next(iter(keys))}: " in miss for miss in found), found


def test_rebuilding_is_refused(folder: Fixture, source: Path) -> None:
    with pytest.raises(FxquantError, match="was not written by fxquant"):
        fxquant.verify(folder(), against=source, rebuild=Rebuild(None))


def test_a_folder_without_config_json_needs_the_source(folder: Fixture, tmp_path: Path) -> None:
    out = edited(folder(), tmp_path / "bare", lambda published: (published.path / "config.json").unlink)
    with pytest.raises(FxquantError, match="no config.json to say what the model is"):
        fxquant.verify(out)
