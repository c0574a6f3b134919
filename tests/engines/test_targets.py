"""`fxquant targets`: contracts, and the table of policy × target × ranks for the published DeepSeek-V3."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from typer.testing import CliRunner, Result

from fxquant import FxquantError
from fxquant.engines.contract import load_contract
from fxquant.engines.rank_layout import served_layout
from fxquant.engines.serving import Serving
from fxquant.engines.table import ENGINES, Target
from fxquant.planning.support_matrix import RANKS, Deployment, deployments, float_program
from fxquant.policy.policy import load_policy, shipped_policies
from fxquant.tools.main import app

TWO_LEVEL = (
    "deepseek_w4a8", "deepseek_w4a8_dynamic", "deepseek_w4a8_dynamic_rotated", "deepseek_w4a8_msmodelslim",
    "deepseek_w4a8_msmodelslim_m4", "deepseek_w4a8_shared_w4",
)  # fmt: skip
ONE_LEVEL = (
    "deepseek_w4a8_per_channel", "deepseek_w4a8_msmodelslim_per_channel", "deepseek_w4a8_per_channel_rotated",
    "deepseek_w4a8_per_channel_static",
)  # fmt: skip
EXPLICIT = ("deepseek_w4a8_msmodelslim", "deepseek_w4a8_msmodelslim_m4")
WITHOUT_INT4 = ("deepseek_w8a8", "deepseek_w8a8_mix", "float")
FIRST = ("deepseek_w4a8", "deepseek_w4a8_per_channel", "deepseek_w8a8_mix")
REST = (*TWO_LEVEL[1:], *ONE_LEVEL[1:], "deepseek_w8a8", "float")
SHOWN = ("deepseek_w4a8", "deepseek_w4a8_shared_w4")
FEW = ("-p", SHOWN[0], "-p", SHOWN[1])


def targets(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["targets", *arguments])


def published(policies: Sequence[str]) -> dict[tuple[str, Target, int], Deployment]:
    """The policies on every target, from the configuration of the 671B model."""
    matrix = deployments(float_program(), [load_policy(name) for name in policies], list(Target))
    return {(deployment.policy, deployment.target, deployment.ranks): deployment for deployment in matrix}


def expected(policy: str, target: Target, ranks: int) -> str:
    """The verdict, as engines are published: 2048 / ranks inputs of down_proj are whole groups of 256."""
    two_level = policy in TWO_LEVEL and (ENGINES[target].int4_group_size or policy in EXPLICIT)
    if target is Target.ONNX:
        return "accepted" if ranks == 1 else "refused"
    if two_level and (target is Target.VLLM_ASCEND or 2048 // ranks % 256):
        return "refused"
    if policy == "deepseek_w4a8_shared_w4" and target is Target.VLLM_ASCEND:
        return "refused"
    if target is Target.SGLANG_NPU and sglang_refuses(policy, ranks):
        return "refused"
    return "unverified" if policy == "deepseek_w4a8_shared_w4" and target is Target.ASCEND else "accepted"


def sglang_refuses(policy: str, ranks: int) -> bool:
    """It keeps int4 experts whole, which ranks without expert parallelism do not, and has fewer schemes."""
    int4 = policy not in WITHOUT_INT4
    return policy in (*EXPLICIT, "deepseek_w4a8_shared_w4", "deepseek_w8a8_mix", "float") or (int4 and ranks > 1)


@pytest.mark.parametrize("policies", [FIRST, pytest.param(REST, marks=pytest.mark.slow)], ids=["first", "rest"])
def test_every_verdict_on_the_published_model(policies: Sequence[str]) -> None:
    assert {*FIRST, *REST} == set(shipped_policies()) == {*TWO_LEVEL, *ONE_LEVEL, *WITHOUT_INT4}
    matrix = published(policies)
    assert len(matrix) == len(policies) * len(Target) * len(RANKS) and RANKS == (1, 2, 4, 8, 16)
    assert {key: deployment.verdict for key, deployment in matrix.items() if deployment.verdict != expected(*key)} == {}
    for deployment in matrix.values():
        assert bool(deployment.words) is (deployment.verdict != "accepted"), deployment
    if policies is FIRST:
        words = matrix["deepseek_w4a8", Target.ASCEND, 16].words
        assert "128 on each of 16 ranks is not a multiple of group_size 256" in words
        assert "group_size auto → 0" in matrix["deepseek_w4a8", Target.VLLM_ASCEND, 1].choice
        known = {target: matrix["deepseek_w4a8", target, 1].evidence for target in (Target.VLLM_ASCEND, Target.MINDIE)}
        assert known == {Target.VLLM_ASCEND: "run", Target.MINDIE: "read"}


def serve_words(target: Target) -> str:
    layout = served_layout(load_contract(target), (), None, None)
    assert layout.tp == (1 if target is Target.ONNX else 8)
    return ENGINES[target].serve(Serving("OUT", layout))


def test_contracts_name_cells_releases_and_how_to_serve() -> None:
    result = targets()
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    for target in Target:
        contract = load_contract(target)
        assert serve_words(target) in words and " ".join(contract.title.split()) in words
        for release in contract.releases:
            assert f"{release.engine} {release.span} loads {release.loads} ({release.evidence}: " in words


def test_contracts_as_json() -> None:
    result = targets("--json", "--target", "mindie")
    (document,) = json.loads(result.output)
    serve = {"serve": serve_words(Target.MINDIE)}
    assert document == load_contract(Target.MINDIE).model_dump(mode="json") | serve and result.exit_code == 0


@pytest.fixture(scope="module")
def small(tiny_folder: Callable[..., Path]) -> tuple[str, dict[tuple[str, Target, int], Deployment]]:
    """A folder whose config.json is all that is read, and its verdicts: one group of 256 on one rank."""
    matrix = deployments(float_program(tiny_folder()), [load_policy(name) for name in SHOWN], list(Target))
    return str(tiny_folder()), {
        (deployment.policy, deployment.target, deployment.ranks): deployment for deployment in matrix
    }


def test_the_table_and_its_footnotes(small: tuple[str, dict]) -> None:
    model, verdicts = small
    result = targets(model, "--table", *FEW)
    assert result.exit_code == 0 and all(policy in result.output for policy in SHOWN)
    counts = [
        [deployment.verdict for deployment in verdicts.values()].count(verdict)
        for verdict in ("accepted", "refused", "unverified")
    ]
    assert [result.stdout.count(mark) for mark in "✓✗?"] == counts and min(counts) > 0


def test_markdown_says_the_same(small: tuple[str, dict]) -> None:
    model, verdicts = small
    result = targets(model, "--markdown", *FEW)
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert result.exit_code == 0 and lines[0] == "| policy | target | TP 1 | TP 2 | TP 4 | TP 8 | TP 16 |"
    assert len(lines) == 2 + len(SHOWN) * len(Target)
    for line in lines[2:]:
        policy, target, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        assert [cell.split(" ")[0] for cell in cells] == [verdicts[policy, Target(target), n].verdict for n in RANKS]
    notes = [line for line in result.stdout.splitlines() if line[:1].isdigit()]
    assert len(notes) == len({deployment.words for deployment in verdicts.values() if deployment.words})


@pytest.mark.slow
def test_the_document_is_what_the_command_prints() -> None:
    """docs/targets.md ends with `fxquant targets --markdown`."""
    document = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    assert document.endswith(targets("--markdown").stdout)


def test_the_published_model_as_json() -> None:
    result = targets("--table", "--json", "-p", "deepseek_w4a8", "-t", "ascend", "--tp", "8", "--tp", "16")
    eight, sixteen = json.loads(result.output)
    assert (eight["verdict"], sixteen["verdict"]) == ("accepted", "refused") and result.exit_code == 0
    same = {"policy": "deepseek_w4a8", "target": "ascend", "words": "", "verdict": "accepted"}
    same |= {"evidence": "run", "choice": "group_size auto → 256: ascend loads groups of 256"}
    assert eight == same | {"ranks": 8, "ep": 1}
    result = targets("--table", "--json", "-p", "deepseek_w4a8", "-t", "ascend", "--tp", "16", "--ep", "16")
    assert json.loads(result.output) == [same | {"ranks": 16, "ep": 16}]


@pytest.mark.parametrize(
    ("policy", "target", "ranks", "code"),
    [
        ("deepseek_w4a8_msmodelslim", "vllm-ascend", "1", 1),
        ("deepseek_w4a8", "vllm-ascend", "1", 0),
        ("deepseek_w4a8_per_channel", "vllm-ascend", "4", 0),
        ("deepseek_w4a8", "mindie", "1", 0),
        ("deepseek_w4a8", "mindie", "2", 1),
        ("deepseek_w4a8_shared_w4", "ascend", "1", 0),
    ],
)
def test_one_deployment_is_the_exit_code(
    small: tuple[str, dict], policy: str, target: str, ranks: str, code: int
) -> None:
    """Unverified is no refusal."""
    result = targets(small[0], "--policy", policy, "--target", target, "--tp", ranks)
    assert result.exit_code == code, result.output


@pytest.mark.parametrize(("arguments", "words"), [(["-t", "tpu"], "Choose one of"), (["-p", "none"], "none")])
def test_unknown_names_are_errors(small: tuple[str, dict], arguments: list[str], words: str) -> None:
    error: Any = targets(small[0], "--table", *arguments).exception
    assert isinstance(error, FxquantError) and words in str(error)
