"""What engines refuse is refused before a weight is read, in words that name layer, rule, limit and way out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from slowness import others_slow

from fxquant.api import compile
from fxquant.compilation.options import CompileOptions
from fxquant.engines.check_contract import Finding, Linear, check, refusal
from fxquant.engines.contract import Cell, Evidence, Verdict, load_contract
from fxquant.engines.reserves import reserves, weakest
from fxquant.engines.table import ENGINES, Target
from fxquant.policy.kinds import Kind
from fxquant.schemes.schemes import ActivationRange, Recipe, Scheme

Folder = Callable[..., Path]
NPU = [Target.ASCEND, Target.MINDIE, Target.MINDIE_2_1RC1, Target.VLLM_ASCEND, Target.SGLANG_NPU]
ONE_LEVEL = (Target.VLLM_ASCEND, Target.SGLANG_NPU)
"""They read experts with one scale per output channel."""
MLP = "model.layers.3.mlp."


def linear(
    name: str, kind: Kind, scheme: Scheme, group_size: int = 0, n: int = 2048, k: int = 7168, heads: int = 0
) -> Linear:
    row_parallel = name.endswith(("down_proj", "o_proj"))
    shape = (k, n) if row_parallel else (n, k)
    recipe = Recipe(name, (name,), scheme, group_size, *shape, False, row_parallel, torch.bfloat16)
    return Linear(recipe, kind, heads)


def expert(name: str, group_size: int = 256, n: int = 2048, k: int = 7168) -> Linear:
    return linear(f"{MLP}experts.{name}", Kind.ROUTED_EXPERT, Scheme.W4A8_DYNAMIC, group_size, n, k)


def experts(group_size: int = 256) -> list[Linear]:
    return [expert(name, group_size) for name in ("gate_proj", "up_proj", "down_proj")]


def stacked(linears: list[Linear]) -> list[Linear]:
    """Each as that of 256 experts."""
    modules = tuple(f"{MLP}experts.{index}" for index in range(256))
    return [replace(one, recipe=replace(one.recipe, modules=modules)) for one in linears]


def refused(target: Target, linears: list[Linear], ranks: int = 1, mix: bool | None = None) -> Finding:
    finding = refusal(check(load_contract(target), linears, ranks, mix))
    assert finding is not None
    return finding


@pytest.mark.parametrize("target", list(Target))
def test_every_cell_has_a_source_and_refusals_a_reason(target: Target) -> None:
    contract = load_contract(target)
    assert contract.target is target and contract.releases
    for cell in contract.cells:
        assert cell.reference and cell.evidence in Evidence, cell
        assert cell.why or cell.verdict is Verdict.ACCEPTED, cell
        assert cell.way_out or cell.verdict is not Verdict.REFUSED, cell


@pytest.mark.parametrize("target", list(Target))
def test_every_kind_may_stay_float_and_what_is_not_named_is_refused(target: Target) -> None:
    contract = load_contract(target)
    for kind in set(Kind) - ({Kind.ROUTED_EXPERT} if target is Target.SGLANG_NPU else set()):
        assert contract.cell(kind, linear("x", kind, Scheme.FLOAT).recipe).verdict is Verdict.ACCEPTED
    nothing = contract.model_copy(update={"cells": ()})
    cell = nothing.cell(Kind.HEAD, linear("x", Kind.HEAD, Scheme.W8A8).recipe)
    assert cell.verdict is Verdict.REFUSED and "no W8A8 for head" in cell.why


SIZES = [(target, size) for target in Target for size in (0, 256) if size in (0, ENGINES[target].int4_group_size)]


@pytest.mark.parametrize(("target", "group_size"), others_slow(SIZES, SIZES[:2]))
def test_headers_hold_what_the_contract_asks(
    target: Target, group_size: int, tiny_folder: Folder, tmp_path: Path
) -> None:
    policy = "deepseek_w4a8_dynamic" if group_size else "deepseek_w4a8_per_channel"
    out = compile(tiny_folder(), CompileOptions(policy=policy, out=tmp_path / "out", target=target, verify=False)).out
    document = json.loads((out / ENGINES[target].description).read_text())
    assert [key for key in document if "." not in key] == list(load_contract(target).header)
    assert document.get("group_size", group_size) == group_size


@pytest.mark.parametrize("target", NPU)
def test_two_level_experts(target: Target) -> None:
    findings = check(load_contract(target), experts())
    if target is Target.VLLM_ASCEND:
        finding = refusal(findings)
        assert finding is not None and finding.module == f"{MLP}experts.gate_proj"
        assert "group_size 256" in finding.fact and "after 0.26.0rc1" in finding.fact and "#13713" in finding.reference
        assert "group_size: 0" in finding.way_out and "--target ascend" in finding.way_out
    elif target is Target.SGLANG_NPU:
        finding = refusal(findings)
        assert finding is not None and "weight_scale_second" in finding.fact and "group_size: 0" in finding.way_out
    else:
        assert not findings


@pytest.mark.parametrize("target", NPU)
def test_groups_of_other_sizes_are_unverified_or_refused(target: Target) -> None:
    findings = check(load_contract(target), experts(64))
    expected = Verdict.REFUSED if target in ONE_LEVEL else Verdict.UNVERIFIED
    assert {finding.verdict for finding in findings} == {expected}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("target", [Target.MINDIE, Target.MINDIE_2_1RC1])
def test_a_rank_has_whole_groups(target: Target, ranks: int) -> None:
    assert not check(load_contract(target), experts(), ranks)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_ascend_keeps_two_level_experts_whole(ranks: int) -> None:
    finding = refused(Target.ASCEND, experts(), ranks)
    assert f"{ranks} ranks split" in finding.fact and "expert parallelism" in finding.way_out
    assert not check(load_contract(Target.ASCEND), stacked(experts()), ranks, ep=ranks)
    assert not check(load_contract(Target.ASCEND), experts(0), ranks)


@pytest.mark.parametrize("target", [Target.MINDIE, Target.MINDIE_2_1RC1])
def test_a_part_of_a_group_is_refused(target: Target) -> None:
    finding = refused(target, experts(), 16)
    assert finding.module.endswith("down_proj") and "128 on each of 16 ranks" in finding.fact and "256" in finding.fact
    assert "fewer ranks" in finding.way_out and "expert parallelism" in finding.way_out
    assert not check(load_contract(target), experts(0), 16)


@pytest.mark.parametrize(("target", "ranks"), [*((target, 3) for target in NPU), (Target.ASCEND, 32), (Target.ONNX, 2)])
def test_numbers_of_ranks(target: Target, ranks: int) -> None:
    assert "tensor-parallel ranks must be 1" in refused(target, [], ranks).fact


def test_unpacked_experts_have_no_sixteen_columns() -> None:
    assert not check(load_contract(Target.MINDIE_2_1RC1), experts(0), 32)


LAYERS = [f"model.layers.{layer}." for layer in (3, 4)]


def in_two_layers(name: str, kind: Kind, *schemes: Scheme) -> list[Linear]:
    return [linear(f"{layer}{name}", kind, scheme) for layer, scheme in zip(LAYERS, schemes, strict=True)]


@pytest.mark.parametrize(
    ("name", "kind", "schemes", "key"),
    [
        ("self_attn.o_proj", Kind.ATTENTION, (Scheme.W8A8, Scheme.W8A8_DYNAMIC), "mla_quantize"),
        ("mlp.experts.up_proj", Kind.ROUTED_EXPERT, (Scheme.W4A8_DYNAMIC, Scheme.W8A8_DYNAMIC), "moe_quantize"),
        ("mlp.experts.up_proj", Kind.ROUTED_EXPERT, (Scheme.FLOAT, Scheme.W8A8_DYNAMIC), "moe_quantize"),
        ("mlp.shared_experts.up_proj", Kind.SHARED_EXPERT, (Scheme.W8A8, Scheme.W4A8_DYNAMIC), "mix_shared_routing"),
    ],
)
def test_mindie_has_one_type_for_each_section(name: str, kind: Kind, schemes: tuple[Scheme, Scheme], key: str) -> None:
    finding = refused(Target.MINDIE, in_two_layers(name, kind, *schemes))
    assert finding.module == f"{LAYERS[1]}{name}" and key in finding.fact and LAYERS[0] in finding.fact
    assert not check(load_contract(Target.MINDIE), in_two_layers(name, kind, schemes[1], schemes[1]))


def test_what_a_section_of_mindie_may_hold_beside_its_type() -> None:
    """A float linear; static ones of MLPs, which it reads per token."""
    beside = in_two_layers("self_attn.o_proj", Kind.ATTENTION, Scheme.FLOAT, Scheme.W8A8)
    beside += in_two_layers("mlp.up_proj", Kind.DENSE_MLP, Scheme.W8A8, Scheme.W8A8_DYNAMIC)
    assert not check(load_contract(Target.MINDIE), beside)


def test_accepted_without_reserve_is_what_was_run() -> None:
    layer = [linear(f"{MLP}shared_experts.up_proj", Kind.SHARED_EXPERT, Scheme.W8A8), *experts()]
    run, read = load_contract(Target.ASCEND), load_contract(Target.MINDIE)
    assert weakest(run, layer) is Evidence.RUN and reserves(run, layer) == []
    assert weakest(read, layer) is Evidence.READ
    (line,) = reserves(read, layer)
    assert line.startswith("accepted (read): W4A8_DYNAMIC with group_size 256 on routed_expert; W8A8 (read per token")
    with pytest.raises(ValueError, match="evidence"):
        Cell.model_validate({"kind": "head", "scheme": "FLOAT", "verdict": "accepted", "reference": "none"})


@pytest.mark.parametrize("target", list(Target))
def test_auto_is_the_largest_group_that_is_accepted(target: Target) -> None:
    size = ENGINES[target].int4_group_size
    assert not check(load_contract(target), experts(size)) and size in (0, 256)


@pytest.mark.parametrize(("n", "k", "fact"), [(2044, 7168, "out_features 2044"), (2048, 7200, "in_features 7200"),
                                              (2048, 20480, "more than 18432")])  # fmt: skip
@pytest.mark.parametrize("target", NPU)
def test_kernels_take_multiples(target: Target, n: int, k: int, fact: str) -> None:
    assert fact in refused(target, [expert("gate_proj", 0, n, k)]).fact


def test_out_features_of_a_rank_are_pairs() -> None:
    assert "on each of 16 ranks" in refused(Target.ASCEND, [expert("gate_proj", 0, n=192)], 16).fact


def test_heads_split_over_ranks() -> None:
    """Told once a layer, at the linear that reads all heads."""
    names = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    layer = [linear(f"{ATTENTION}{name}", Kind.ATTENTION, Scheme.W8A8_DYNAMIC, heads=24) for name in names]
    (finding,) = check(load_contract(Target.VLLM_ASCEND), layer, 16)
    assert finding.module == f"{ATTENTION}o_proj" and finding.verdict is Verdict.REFUSED
    assert "24 heads do not split over 16 ranks" in finding.fact and "divides 24" in finding.way_out
    assert not check(load_contract(Target.VLLM_ASCEND), layer, 8)


ATTENTION = "model.layers.0.self_attn."
PAIRS = [
    (ATTENTION + "q_a_proj", ATTENTION + "kv_a_proj_with_mqa", Kind.ATTENTION),
    ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", Kind.DENSE_MLP),
    (MLP + "shared_experts.gate_proj", MLP + "shared_experts.up_proj", Kind.SHARED_EXPERT),
]


@pytest.mark.parametrize(("module", "other", "kind"), PAIRS)
@pytest.mark.parametrize("target", NPU)
def test_shards_of_a_fused_module_share_a_scheme(target: Target, module: str, other: str, kind: Kind) -> None:
    if target is Target.MINDIE and kind is Kind.ATTENTION:
        pytest.skip("they are linears of their own")
    for scheme in (Scheme.W8A8, Scheme.FLOAT):
        finding = refused(target, [linear(module, kind, Scheme.W8A8_DYNAMIC), linear(other, kind, scheme)])
        assert (
            finding.module == module and other.rpartition(".")[2] in finding.fact and "fuses both into" in finding.fact
        )
    assert not check(load_contract(target), [linear(name, kind, Scheme.W8A8_DYNAMIC) for name in (module, other)])


@pytest.mark.parametrize("target", [target for target in NPU if target is not Target.MINDIE])
def test_static_shards_share_a_range(target: Target) -> None:
    def static(name: str, high: float) -> Linear:
        recipe = linear(name, Kind.ATTENTION, Scheme.W8A8).recipe
        return Linear(replace(recipe, activation=ActivationRange(-1.0, high)), Kind.ATTENTION)

    module, other, _ = PAIRS[0]
    assert not check(load_contract(target), [static(module, 2.0), static(other, 2.0)])
    assert "-1 … 3" in refused(target, [static(module, 2.0), static(other, 3.0)]).fact


@pytest.mark.parametrize("target", NPU)
def test_experts_of_a_layer_share_a_scheme(target: Target) -> None:
    down = linear(f"{MLP}experts.down_proj", Kind.ROUTED_EXPERT, Scheme.W8A8_DYNAMIC)
    size = 0 if target in ONE_LEVEL else 256
    assert "fuses both into experts" in refused(target, [expert("gate_proj", size), expert("up_proj", size), down]).fact


def test_mixing_shared_experts_in_mindie() -> None:
    contract = load_contract(Target.MINDIE)
    int4 = linear(f"{MLP}shared_experts.gate_proj", Kind.SHARED_EXPERT, Scheme.W4A8_DYNAMIC, 256)
    int8 = linear(f"{MLP}shared_experts.gate_proj", Kind.SHARED_EXPERT, Scheme.W8A8_DYNAMIC)
    assert not check(contract, [int4]) and not check(contract, [int8])
    assert not check(contract, [int4], mix=True) and not check(contract, [int8], mix=False)
    for shared, mix, state in ((int4, False, "off"), (int8, True, "on")):
        finding = refused(Target.MINDIE, [shared], mix=mix)
        assert f"mix_shared_routing {state}" in finding.fact and "ValueError" not in finding.fact


@pytest.mark.parametrize("target", [Target.VLLM_ASCEND, Target.SGLANG_NPU, Target.MINDIE])
def test_a_bias_that_is_not_loaded(target: Target) -> None:
    dynamic = linear(ATTENTION + "q_a_proj", Kind.ATTENTION, Scheme.W8A8_DYNAMIC).recipe
    biased = Linear(replace(dynamic, bias=True), Kind.ATTENTION)
    fact = refused(target, [biased]).fact
    assert "not loaded" in fact or "built without .bias" in fact
    assert not check(load_contract(target), [Linear(replace(biased.recipe, scheme=Scheme.W8A8), Kind.ATTENTION)])


@pytest.mark.parametrize("target", NPU)
def test_dtypes_of_models(target: Target) -> None:
    recipe = linear(ATTENTION + "q_a_proj", Kind.ATTENTION, Scheme.W8A8).recipe
    (finding,) = check(load_contract(target), [Linear(replace(recipe, dtype=torch.float32), Kind.ATTENTION)])
    assert "float32" in finding.fact and "torch_dtype" in finding.way_out
    assert finding.verdict is (Verdict.UNVERIFIED if target is Target.ASCEND else Verdict.REFUSED)
    half = check(load_contract(target), [Linear(replace(recipe, dtype=torch.float16), Kind.ATTENTION)])
    assert [finding.verdict for finding in half] == ([Verdict.REFUSED] if target is Target.SGLANG_NPU else [])
    dynamic = replace(recipe, dtype=torch.float16, scheme=Scheme.W8A8_DYNAMIC)
    if target in (Target.ASCEND, Target.VLLM_ASCEND):
        (finding,) = check(load_contract(target), [Linear(dynamic, Kind.ATTENTION)])
        assert finding.verdict is Verdict.UNVERIFIED and "scales of float16" in finding.fact


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_sglang_keeps_int4_experts_whole(ranks: int) -> None:
    whole = stacked(experts(0))
    finding = refused(Target.SGLANG_NPU, whole, ranks)
    assert f"{ranks} ranks split" in finding.fact and "expert parallelism" in finding.way_out
    assert not check(load_contract(Target.SGLANG_NPU), whole, ranks, ep=ranks)
    dynamic = [linear(f"{MLP}experts.gate_proj", Kind.ROUTED_EXPERT, Scheme.W8A8_DYNAMIC)]
    assert not check(load_contract(Target.SGLANG_NPU), dynamic, ranks)


@pytest.mark.parametrize("target", [Target.MINDIE, Target.VLLM_ASCEND, Target.SGLANG_NPU])
def test_kv_b_proj_stays_float(target: Target) -> None:
    kv_b = linear(ATTENTION + "kv_b_proj", Kind.ATTENTION, Scheme.W8A8_DYNAMIC)
    assert "absorbed" in refused(target, [kv_b]).fact
