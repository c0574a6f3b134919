"""What an engine refuses, or would take without a word and turn into garbage, is an error that names the place."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from open_readers import open_reader
from reader_folders import EXPERTS, UNPACKED_DESCRIPTION, WEIGHTS, Draft
from safetensors.torch import save_file

from fxquant.engines.ascend.reader import open_vllm_ascend_per_group
from fxquant.errors import FxquantError

ATTENTION = "model.layers.0.self_attn"
LINEAR = f"{ATTENTION}.q_a_proj"
OTHER = f"{ATTENTION}.kv_a_proj_with_mqa"
FUSED = (LINEAR, OTHER)
DOWN = f"{EXPERTS}.1.down_proj"


def static_pair() -> Draft:
    draft = Draft()
    for module in FUSED:
        draft.static(module, 16, 64)
    return draft


def experts(group: int = 0, packed: bool = True) -> Draft:
    draft = Draft()
    draft.expert_layer(256, 256, group, packed)
    return draft


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LINEAR}.deq_scale"), r"q_a_proj.deq_scale: missing"),
        (lambda t: t.pop(f"{LINEAR}.weight"), r"q_a_proj.weight: missing"),
        (lambda t: t.update({f"{LINEAR}.scale_bias": torch.ones(16, 1)}), r"scale_bias: .*has no parameter"),
        (lambda t: t.update({f"{LINEAR}.deq_scale": torch.ones(15)}), r"deq_scale: F32 \[15\]; .*float32 \[16\]"),
        (lambda t: t.update({f"{LINEAR}.deq_scale": torch.ones(16).double()}), r"F64 \[16\]; .*float32 \[16\]"),
        (lambda t: t.update({f"{LINEAR}.quant_bias": torch.ones(16)}), r"F32 \[16\]; the engine takes int32"),
        (lambda t: t.update({f"{LINEAR}.input_offset": torch.ones(1) / 2}), r"input_offset: is 0.5"),
    ],
)
def test_tensors_of_a_static_linear(tmp_path: Path, change: Callable[[dict], object], message: str) -> None:
    draft = static_pair()
    change(draft.tensors)
    draft.types |= dict.fromkeys(draft.tensors, "W8A8")
    with pytest.raises(FxquantError, match=message):
        open_reader("vllm-ascend", draft.write(tmp_path)).linear(LINEAR)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{DOWN}.scale_bias"), r"down_proj.scale_bias: missing"),
        (lambda t: t.pop(f"{DOWN}.weight_offset"), r"down_proj.weight_offset: missing"),
        (lambda t: t.update({f"{DOWN}.scale_bias": torch.ones(256, 1)}), r"\[256, 1\]; .*\[256, 16\]"),
        (lambda t: t.update({f"{DOWN}.weight_scale_second": torch.ones(256, 1)}), r"second: .*has no parameter"),
        (lambda t: t.update({f"{DOWN}.weight": torch.ones(64, 256, dtype=torch.int8)}), r"\[256, 1\]; .*\[128, 1\]"),
    ],
)
def test_tensors_of_an_expert(tmp_path: Path, change: Callable[[dict], object], message: str) -> None:
    draft = experts()
    change(draft.tensors)
    draft.types |= dict.fromkeys(draft.tensors, "W4A8_DYNAMIC")
    with pytest.raises(FxquantError, match=message):
        open_reader("vllm-ascend", draft.write(tmp_path)).expert_linear(DOWN, row_parallel=True)


def test_vllm_ascend_of_today_refuses_groups(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"group_size 256: per-group experts are no longer read"):
        open_reader("vllm-ascend", experts(256).write(tmp_path))


def test_releases_for_groups_refuse_channels_and_unpacked_weights(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"group_size 0: the experts are per channel"):
        open_reader("vllm-ascend-per-group", experts().write(tmp_path / "channel"))
    draft = experts(256)
    del draft.header["version"]
    with pytest.raises(FxquantError, match="reads the weights as unpacked"):
        open_reader("vllm-ascend-per-group", draft.write(tmp_path / "unpacked"))


def test_sglang_refuses_what_its_releases_do_not_serve(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="group_size 256: every release skips weight_scale_second"):
        open_reader("sglang-npu", experts(256).write(tmp_path / "groups"))
    with pytest.raises(FxquantError, match="float16: per-token linears"):
        draft = Draft(torch.float16)
        draft.per_token(LINEAR, 64, 64)
        open_reader("sglang-npu", draft.write(tmp_path / "half"))
    folder = experts().write(tmp_path / "channels")
    open_reader("sglang-npu", folder).expert_linear(DOWN, row_parallel=True)
    for projection in ("gate_proj", "down_proj"):
        with pytest.raises(FxquantError, match="int4 on 2 ranks: each adds the whole scale_bias"):
            module = f"{EXPERTS}.1.{projection}"
            open_reader("sglang-npu", folder, 2).expert_linear(module, row_parallel=projection == "down_proj")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("q_b_proj", "W8A8_MIX", "no scheme for it on linears"),
        ("q_b_proj", "W4A8_DYNAMIC", "no scheme for it on linears"),
        ("kv_b_proj", "W8A8_DYNAMIC", "computes it in floating point"),
    ],
)
def test_linears_that_sglang_has_no_scheme_for(tmp_path: Path, name: str, kind: str, message: str) -> None:
    draft, module = Draft(), f"{ATTENTION}.{name}"
    draft.per_token(module, 64, 64)
    draft.types |= dict.fromkeys((key for key in draft.types if key.startswith(module)), kind)
    with pytest.raises(FxquantError, match=message):
        open_reader("sglang-npu", draft.write(tmp_path)).linear(module)


def test_sglang_has_no_float_experts(tmp_path: Path) -> None:
    draft = experts()
    draft.types |= dict.fromkeys(draft.types, "FLOAT")
    with pytest.raises(FxquantError, match="no float experts"):
        open_reader("sglang-npu", draft.write(tmp_path)).expert_linear(DOWN, row_parallel=True)


def test_split_experts_of_two_levels(tmp_path: Path) -> None:
    """No release from 0.13.0 on loads them (tests/engines/released)."""
    reader = open_vllm_ascend_per_group(experts(256).write(tmp_path), 2)
    with pytest.raises(FxquantError, match="two-level, split over ranks: .* 0.23.0 leaves it unset"):
        reader.expert_linear(DOWN, row_parallel=True)


def test_a_header_that_contradicts_the_experts(tmp_path: Path) -> None:
    draft = experts(256)
    draft.header["group_size"] = 0
    reader = open_reader("sglang-npu", draft.write(tmp_path))
    with pytest.raises(FxquantError, match=r"weight_(offset|scale)_second: the engine has no parameter"):
        reader.expert_linear(DOWN, row_parallel=True)


@pytest.mark.parametrize(
    ("engine", "module", "kind", "message"),
    [
        ("vllm-ascend", LINEAR, "W4A8_DYNAMIC", "W4A8_DYNAMIC; vllm-ascend takes FLOAT, W8A8"),
        ("mindie", LINEAR, "W8A16", "W8A16, but mla_quantize of config.json is w8a8, for all modules of the section"),
    ],
)
def test_types_of_linears(tmp_path: Path, engine: str, module: str, kind: str, message: str) -> None:
    draft = static_pair()
    draft.types |= dict.fromkeys(draft.types, kind)
    if engine == "mindie":
        draft.for_mindie(256, mla_quantize="w8a8")
    with pytest.raises(FxquantError, match=message):
        open_reader(engine, draft.write(tmp_path)).linear(module)


def test_types_of_experts(tmp_path: Path) -> None:
    draft = experts()
    for name in draft.types:
        draft.types[name] = "W8A8"
    with pytest.raises(FxquantError, match="takes FLOAT, W8A8_DYNAMIC, W4A8_DYNAMIC for experts"):
        open_reader("vllm-ascend", draft.write(tmp_path)).expert_linear(DOWN, row_parallel=True)


def test_only_expert_zero_decides_the_type_of_a_layer(tmp_path: Path) -> None:
    draft = experts()
    for name in [name for name in draft.types if name.startswith(f"{EXPERTS}.1.")]:
        draft.types[name] = "W8A8_DYNAMIC"
    with pytest.raises(FxquantError, match=r"experts.1: its tensors are of types"):
        open_reader("vllm-ascend", draft.write(tmp_path)).expert_linear(DOWN, row_parallel=True)


def test_a_tensor_that_the_description_lacks_or_calls_otherwise(tmp_path: Path) -> None:
    draft = static_pair()
    del draft.types[f"{LINEAR}.weight"]
    with pytest.raises(FxquantError, match=r"q_a_proj.weight is missing"):
        open_reader("vllm-ascend", draft.write(tmp_path)).linear(LINEAR)
    draft.types[f"{LINEAR}.weight"] = "W8A8_DYNAMIC"
    with pytest.raises(FxquantError, match=r"its tensors are described as"):
        open_reader("vllm-ascend", draft.write(tmp_path)).linear(LINEAR)


def test_shards_of_a_fused_module_agree(tmp_path: Path) -> None:
    draft = static_pair()
    reader = open_reader("vllm-ascend", draft.write(tmp_path / "same"))
    assert reader.fused_with(OTHER) == FUSED and reader.fused_with(f"{ATTENTION}.o_proj") == ()
    reader.check_fused(FUSED)
    draft.tensors[f"{OTHER}.input_scale"] = draft.tensors[f"{OTHER}.input_scale"] * 2
    reader = open_reader("vllm-ascend", draft.write(tmp_path / "scale"))
    with pytest.raises(FxquantError, match=r"q_a_proj \+ .*kv_a_proj_with_mqa: fused, but with input_scale"):
        reader.check_fused(FUSED)
    for name in [name for name in draft.types if name.startswith(OTHER)]:
        draft.types[name] = "FLOAT"
    reader = open_reader("sglang-npu", draft.write(tmp_path / "type"))
    with pytest.raises(FxquantError, match="fused, but of types"):
        reader.check_fused(FUSED)


@pytest.mark.parametrize(
    ("group", "ranks", "message"),
    [
        (0, 3, "3 ranks do not divide the 16 columns"),
        (0, 32, "32 ranks do not divide"),
        (0, 8, "in_features 32 on one rank; the kernel takes multiples of 64"),
    ],
)
def test_ranks_that_do_not_fit_the_experts(tmp_path: Path, group: int, ranks: int, message: str) -> None:
    folder = experts(group).write(tmp_path)
    with pytest.raises(FxquantError, match=message):
        open_reader("vllm-ascend", folder, ranks).expert_linear(DOWN, row_parallel=True)


def test_groups_that_ranks_do_not_share(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="in_features 256 is not a multiple of 2 ranks x 256"):
        folder = experts(256).write(tmp_path)
        open_reader("vllm-ascend-per-group", folder, 2).expert_linear(DOWN, row_parallel=True)


def test_folders_that_contradict_themselves(tmp_path: Path) -> None:
    folder = static_pair().write(tmp_path)
    index = folder / "quant_model_weight_w8a8_dynamic.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"absent.weight": WEIGHTS}}))
    with pytest.raises(FxquantError, match="absent.weight in .*, stored in None"):
        open_reader("vllm-ascend", folder)
    index.unlink()
    save_file({f"{LINEAR}.weight": torch.ones(2, 2)}, folder / "other.safetensors")
    with pytest.raises(FxquantError, match="in other.safetensors and in"):
        open_reader("vllm-ascend", folder)
    with pytest.raises(FxquantError, match=f"{UNPACKED_DESCRIPTION}: missing; there is config.json, quant_model_desc"):
        open_reader("mindie-2.1rc1", folder)


def test_numbers_of_ranks_and_names_of_experts(tmp_path: Path) -> None:
    folder = experts().write(tmp_path)
    with pytest.raises(FxquantError, match="tp: 0 ranks"):
        open_reader("vllm-ascend", folder, 0)
    reader = open_reader("vllm-ascend", folder)
    with pytest.raises(FxquantError, match="is not a projection of a routed expert"):
        reader.expert_linear(LINEAR)
    with pytest.raises(FxquantError, match="Engines split k of down_proj only"):
        reader.expert_linear(DOWN, row_parallel=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    with pytest.raises(FxquantError, match="torch_dtype is float32"):
        open_reader("vllm-ascend", folder).expert_linear(DOWN, row_parallel=True)
