"""DeepSeek-V3's neighbours: each shipped policy works on them, or the refusal names one that does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from neighbours import NEIGHBOURS
from tiny import tiny_config, write_checkpoint

import fxquant
from fxquant import CompileOptions
from fxquant.engines.table import Target
from fxquant.errors import FxquantError
from fxquant.frontend.source import Source, source_of_config
from fxquant.planning.contents import planned
from fxquant.planning.support_matrix import deployments
from fxquant.policy.kinds import Kind
from fxquant.policy.policy import MtpMode, load_policy, shipped_policies
from fxquant.program.structural_hash import structural_hash
from fxquant.text.tokenizer import open_tokenizer

NAMED = re.compile(r"policy (deepseek_[a-z0-9_]+)(?! gives)")


def described(**changes: Any) -> Source:
    """Only the config of such a model."""
    changes = {key: value for key, value in changes.items() if key != "fp8"}
    return source_of_config(tiny_config(torch_dtype="bfloat16", **changes), Path("model/config.json"))


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_every_shipped_policy_works_or_another_is_named(name: str) -> None:
    program = described(**NEIGHBOURS[name]).program()
    policies = [load_policy(policy) for policy in shipped_policies()]
    verdicts = {one.policy: one for one in deployments(program, policies, [Target.ASCEND], [1])}
    refused = {policy: one.words for policy, one in verdicts.items() if one.verdict == "refused"}
    for words in refused.values():
        named = NAMED.search(words)
        assert named is not None and named[1] not in refused, words
    in_groups = {policy for policy in verdicts if "msmodelslim" in policy and "per_channel" not in policy}
    assert set(refused) == (in_groups if name == "Moonlight" else set())


@pytest.mark.parametrize(
    ("changes", "policy", "way_out"),
    [
        ({"moe_intermediate_size": 192}, "deepseek_w4a8_msmodelslim", "use policy deepseek_w4a8_per_channel"),
        ({"moe_intermediate_size": 176}, "deepseek_w4a8_msmodelslim", "use policy deepseek_w4a8_per_channel"),
        ({"moe_intermediate_size": 176}, "deepseek_w4a8_per_channel", "as policy deepseek_w8a8 does"),
        ({"moe_intermediate_size": 176}, "deepseek_w8a8", ""),
    ],
)
def test_sizes_that_do_not_fit_name_the_policy_that_does(changes: dict[str, Any], policy: str, way_out: str) -> None:
    source = described(**changes)
    if not way_out:
        planned(source, load_policy(policy), CompileOptions())
        return
    with pytest.raises(FxquantError) as caught:
        planned(source, load_policy(policy), CompileOptions())
    assert way_out in caught.value.remedy


@pytest.mark.parametrize("name", ["Kimi-K2", "all dense"])
def test_a_neighbour_compiles_and_verifies(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", **NEIGHBOURS[name])
    (folder / "tiktoken.model").write_text("IQ== 0\n")
    report = fxquant.compile(folder, CompileOptions(policy="deepseek_w4a8_dynamic", out=tmp_path / "out"))
    assert report.verification is not None and report.verification.verdict == "verified"
    written = json.loads((report.out / "config.json").read_text())
    assert written["model_type"] == NEIGHBOURS[name].get("model_type", "deepseek_v3")
    assert (report.out / "tiktoken.model").read_bytes() == (folder / "tiktoken.model").read_bytes()


def test_kimi_k2_has_the_graph_of_deepseek_v3() -> None:
    changes = NEIGHBOURS["Kimi-K2"]
    own, same = (described(**{**changes, "model_type": kind}) for kind in ("kimi_k2", "deepseek_v3"))
    assert structural_hash(own.program()) == structural_hash(same.program())


def test_a_tokenizer_that_only_the_models_code_reads_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_text("IQ== 0\n")
    with pytest.raises(FxquantError) as caught:
        open_tokenizer(tmp_path)
    assert caught.value.fact == "has no tokenizer.json; only the model's own code reads tiktoken.model."
    assert "use token ids" in caught.value.remedy


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("mode", MtpMode)
def test_any_number_of_prediction_layers(count: int, mode: MtpMode) -> None:
    source = described(num_nextn_predict_layers=count)
    options = CompileOptions(mtp=mode)
    if count == 0 and mode is not MtpMode.NONE:
        with pytest.raises(FxquantError, match="no multi-token prediction layers"):
            planned(source, load_policy("deepseek_w4a8_dynamic"), options)
        return
    rows = planned(source, load_policy("deepseek_w4a8_dynamic"), options).rows
    kept: dict[str, set[str]] = {"none": set(), "float": {"FLOAT"}, "quant": {"FLOAT", "W8A8_DYNAMIC"}}
    schemes = {row.scheme for row in rows if row.kind is Kind.MTP} - {"LEAVE_OUT"}
    assert schemes == (kept[mode.value] if count else set())
