"""Ranks, tensor and expert parallel: what contracts refuse, what is chosen, and the serve lines of each."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant.engines.check_contract import Finding, Linear, check, refusal
from fxquant.engines.contract import Contract, load_contract
from fxquant.engines.rank_layout import checked_layout, served_layout
from fxquant.engines.serving import RankLayout, Serving
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.passes import AssignSchemes
from fxquant.passes.check_contract import linears
from fxquant.planning.support_matrix import float_program
from fxquant.policy.kinds import Kind
from fxquant.policy.policy import load_policy, shipped_policies
from fxquant.schemes.schemes import Recipe, Scheme

NPU = [Target.ASCEND, Target.MINDIE, Target.VLLM_ASCEND, Target.SGLANG_NPU]
INT4_SHARED = "deepseek_w4a8_shared_w4"
"""On a tiny model one group of 256 is all of a shared expert's k, which expert parallelism keeps whole where it runs
as one of the routed ones."""
MLP = "model.layers.3.mlp."


def expert(group_size: int = 256, experts: int = 256) -> Linear:
    """down_proj of V3."""
    modules = tuple(f"{MLP}experts.{index}.down_proj" for index in range(experts))
    module = f"{MLP}experts.down_proj"
    recipe = Recipe(module, modules, Scheme.W4A8_DYNAMIC, group_size, 7168, 2048, False, True, torch.bfloat16)
    return Linear(recipe, Kind.ROUTED_EXPERT)


def refused(contract: Contract, linears: list[Linear], tp: int, ep: int) -> Finding:
    finding = refusal(check(contract, linears, tp, ep=ep))
    assert finding is not None
    return finding


@pytest.mark.parametrize("target", [Target.ASCEND, Target.MINDIE])
def test_whole_experts_keep_their_groups(target: Target) -> None:
    """k = 2048 on 16 ranks is half a group; other linears are split as before."""
    contract = load_contract(target)
    assert "--ep N" in refused(contract, [expert()], 16, 1).way_out
    assert not check(contract, [expert()], 16, ep=16)
    int8 = replace(expert().recipe, scheme=Scheme.W8A8_DYNAMIC, group_size=0, in_features=24)
    assert refusal(check(contract, [Linear(int8, Kind.MTP)], 16, ep=16)) is None
    assert refused(contract, [Linear(int8, Kind.MTP)], 16, 1)
    shared = Linear(replace(int8, modules=int8.modules[:1]), Kind.SHARED_EXPERT)
    assert "24 does not split over 16 ranks" in refused(contract, [shared], 16, 16).fact


def test_a_shared_expert_that_runs_with_the_routed_ones_is_whole_too() -> None:
    shared = Linear(expert(experts=1).recipe, Kind.SHARED_EXPERT)
    assert not check(load_contract(Target.MINDIE), [shared], 16, ep=16)
    assert "128 on each of 16 ranks" in refused(load_contract(Target.MINDIE), [shared], 16, 1).fact


@pytest.mark.parametrize(
    ("tp", "ep", "experts", "fact"),
    [(8, 12, 256, "12 expert-parallel ranks are not a multiple of 8"), (8, 4, 256, "4 expert-parallel ranks"),
     (1, 3, 256, "256 experts do not split over 3"), (16, 32, 48, "48 experts do not split over 32")],
)  # fmt: skip
def test_numbers_that_do_not_fit(tp: int, ep: int, experts: int, fact: str) -> None:
    assert fact in refused(load_contract(Target.ASCEND), [expert(experts=experts)], tp, ep).fact


def test_one_process_has_no_ranks() -> None:
    finding = refused(load_contract(Target.ONNX), [expert()], 1, 8)
    assert "8 expert-parallel ranks" in finding.fact and "one rank" in finding.way_out


def test_an_engine_that_reads_split_experts_wrong() -> None:
    contract = load_contract(Target.ASCEND)
    ranks = contract.tensor_parallel.model_copy(update={"experts_whole": "int4"})
    contract = contract.model_copy(update={"tensor_parallel": ranks})
    assert not check(contract, [expert(group_size=0)]) and not check(contract, [expert(group_size=0)], 8, ep=8)
    assert "8 ranks split are read wrong" in refused(contract, [expert(group_size=0)], 8, 1).fact
    assert served_layout(contract, [expert(group_size=0)], None, None) == RankLayout(8, 8)
    int8 = Linear(replace(expert(group_size=0).recipe, scheme=Scheme.W8A8_DYNAMIC), Kind.ROUTED_EXPERT)
    assert not check(contract, [int8], 8)


def test_what_is_asked_for_is_checked_and_served() -> None:
    contract = load_contract(Target.ASCEND)
    for asked, layout in (((16, 16), RankLayout(16, 16)), ((4, None), RankLayout(4)), ((None, 1), RankLayout())):
        assert checked_layout(contract, [expert()], *asked) == served_layout(contract, [expert()], *asked) == layout
    assert checked_layout(contract, [expert()], None, 64) == RankLayout(8, 64)
    assert checked_layout(contract, [expert()], None, None) == RankLayout()
    assert served_layout(contract, [expert()], None, None) == RankLayout(8, 8)
    assert served_layout(contract, [expert(group_size=0)], None, None) == RankLayout(8, 8)  # 0.13.0 has no split ones


@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize("target", list(Target))
def test_no_policy_gets_a_number_of_ranks_that_its_contract_refuses(
    target: Target, heads: int, tiny_folder: Callable[..., Path]
) -> None:
    program, contract = float_program(tiny_folder(num_attention_heads=heads)), load_contract(target)
    for name in shipped_policies():
        assigned = replace(program, recipes={}, rules={}, unused_rules=[])
        engine = ENGINES[target]
        AssignSchemes(load_policy(name), (), engine.weight_format, engine.int4_group_size, target).apply(assigned)
        described = linears(assigned)
        layout = served_layout(contract, described, None, None)
        if refusal(check(contract, described)) is None:
            assert refusal(check(contract, described, layout.tp, ep=layout.ep)) is None
            runs_as_expert = contract.shared_expert_mix is not None  # then a shared expert in int4 is whole as well
            split = target is not Target.ONNX and (name != INT4_SHARED or runs_as_expert)
            assert layout.tp == ({4: 4, 6: 2}[heads] if split else 1)


def lines(**layout: int) -> dict[Target, str]:
    return {target: engine.serve(Serving("OUT", RankLayout(**layout))) for target, engine in ENGINES.items()}


def mindie(line: str) -> dict[str, Any]:
    (model,) = json.loads("{" + line + "}")["ModelConfig"]
    return model


def test_lines_of_split_experts() -> None:
    said = lines(tp=8)
    assert said[Target.VLLM_ASCEND] == "vllm serve OUT --quantization ascend --tensor-parallel-size 8"
    assert said[Target.SGLANG_NPU].endswith("--attention-backend ascend --tp-size 8")
    model = mindie(said[Target.MINDIE])
    assert [model[key] for key in ("worldSize", "dp", "tp", "moe_tp", "moe_ep")] == [8, 1, 8, 8, 1]


def test_lines_of_whole_experts() -> None:
    said = lines(tp=16, ep=16)
    assert said[Target.ASCEND].endswith("--tensor-parallel-size 16 --enable-expert-parallel")
    assert said[Target.SGLANG_NPU].endswith("--tp-size 16 --ep-size 16")
    model = mindie(said[Target.MINDIE])
    assert [model[key] for key in ("worldSize", "dp", "tp", "moe_tp", "moe_ep")] == [16, 1, 16, 1, 16]


def test_lines_of_copies_that_share_experts() -> None:
    """Four copies of attention on four ranks each; SGLang's `--tp-size` counts all of them."""
    said = lines(tp=4, ep=16)
    assert "--tensor-parallel-size 4 --data-parallel-size 4 --enable-expert-parallel" in said[Target.VLLM_ASCEND]
    assert said[Target.SGLANG_NPU].endswith("--tp-size 16 --dp-size 4 --enable-dp-attention --ep-size 16")
    model = mindie(said[Target.MINDIE])
    assert [model[key] for key in ("worldSize", "dp", "tp", "moe_tp", "moe_ep")] == [16, 4, 4, 1, 16]


@pytest.mark.parametrize("target", [Target.ASCEND, Target.VLLM_ASCEND, Target.SGLANG_NPU])
def test_a_float_model_is_not_said_to_be_quantized(target: Target) -> None:
    assert "--quantization" not in ENGINES[target].serve(Serving("OUT", quantized=False))


@pytest.mark.parametrize(("draft", "quantized"), [(True, True), (True, False), (False, True)])
def test_sglang_is_told_of_a_float_draft_of_a_quantized_model(draft: bool, quantized: bool) -> None:
    line = ENGINES[Target.SGLANG_NPU].serve(Serving("OUT", quantized=quantized, float_draft=draft))
    assert ("--speculative-draft-model-quantization unquant" in line) is (draft and quantized)


@pytest.mark.parametrize("mixed", [False, True])
def test_mindie_is_told_how_shared_experts_run(mixed: bool) -> None:
    line = ENGINES[Target.MINDIE].serve(Serving("OUT", mixed=mixed))
    assert mindie(line)["models"] == {"deepseekv2": {"mix_shared_routing": mixed}}


def test_options_are_whole_numbers() -> None:
    from fxquant import CompileOptions

    for wrong in (0, -1, "2", True, 1.0):
        with pytest.raises(FxquantError, match="ep="):
            CompileOptions(ep=wrong)  # type: ignore[arg-type]
