"""What the verbs print at any width and in a log: every name whole, every command one line."""

import ast
import io
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxquant.calibration.calibration_file import Calibration, Seen
from fxquant.engines.contract import Verdict, load_contract
from fxquant.engines.serving import Serving
from fxquant.engines.table import ENGINES, Target
from fxquant.evaluation.divergence import Evaluation
from fxquant.evaluation.sensitivity_report import ModuleLoss, Sensitivity
from fxquant.evaluation.verbs import Compared
from fxquant.lowering.weights.work import WorkReport
from fxquant.planning.estimate import Estimate, Memory
from fxquant.planning.host_benchmark import Machine
from fxquant.planning.plan import Plan
from fxquant.planning.support_matrix import RANKS, Deployment
from fxquant.planning.tally import PlanRow
from fxquant.policy.kinds import Kind
from fxquant.runtime.divergence import Divergence
from fxquant.tools import sensitivity, targets
from fxquant.tools.compare import comparison_table, difference_table
from fxquant.tools.compile_report import few_tokens_line, print_report
from fxquant.tools.console import LOG_WIDTH, Terminal
from fxquant.tools.evaluate import evaluation_table
from fxquant.tools.plan import print_plan
from fxquant.tools.tables import NamedTable
from fxquant.tools.verify import verification_tables
from fxquant.verification.report import Check, VerifyReport

WIDTHS = (60, 80, 120, LOG_WIDTH)
MODULE = "model.layers.{}.mlp.shared_experts.down_proj"
POLICIES = ("deepseek_w4a8_per_channel_static", "deepseek_w4a8_msmodelslim_m4", "float")
ENGINE = "vllm-ascend-per-group, exact"


def printed(width: int, show: Callable[[Terminal], None]) -> str:
    to = Terminal(width=width, file=io.StringIO())
    show(to)
    return to.file.getvalue()


def evaluation() -> Evaluation:
    figures = ("quantized_perplexity", "perplexity_ratio", "kl_mean", "kl_p99", "top1_agreement")
    spans = dict.fromkeys(figures, (0.0035, 0.0041)) | {"kl_difference": (-0.00013, 0.00031)}
    return Evaluation(11.9462, 12.0083, 1.0052, 0.0038, 0.0391, 0.954, 16320, 64, spans, 0.00007)


def show_comparison(to: Terminal) -> None:
    compared = dict.fromkeys(POLICIES, Compared(evaluation(), 10**9, []))
    to.print(comparison_table("model", "text", compared))
    to.print(difference_table(compared))


def verification() -> VerifyReport:
    worst = "0.018 of the largest value at " + MODULE.format(60)
    checks = [
        Check("files: digest", 91_000, 91_000),
        Check("vllm-ascend-per-group: activations == graph", 46_000, 80, ["x"] * 3),
        Check("vllm-ascend-per-group: device rounding", 80, 80, worst=worst),
    ]
    return VerifyReport(checks=checks, source="model", noise=Divergence(192, 0.0016, 0.15, 0.99, 0.064))


def losses() -> Sensitivity:
    sums, tokens = torch.rand(4, generator=torch.manual_seed(0), dtype=torch.float64), torch.tensor([9, 9, 9, 9])
    modules = [
        ModuleLoss.of(MODULE.format(i), Kind.SHARED_EXPERT, f"model.layers.{i}", "W8A8_DYNAMIC", 40.0, sums, tokens)
        for i in range(3)
    ]
    return Sensitivity.of(modules, sums, tokens)


def serve_line(target: Target, folder: object) -> str:
    return ENGINES[target].serve(Serving(str(folder)))


def compile_report_of(out: Path, **changes: Any) -> Any:
    rules = {"attention at *.kv_b_proj → FLOAT": (61, 2_046_820_352), "W4A8_DYNAMIC": (44_544, 1_307_817_541_632)}
    ledger = SimpleNamespace(
        totals=lambda: {("rewritten", why): count for why, count in rules.items()},
        entries=[SimpleNamespace(nbytes=nbytes) for _, nbytes in rules.values()],
    )
    steps = [SimpleNamespace(calls_before=4268, calls_after=3100)]
    output = SimpleNamespace(
        files=[SimpleNamespace(nbytes=13_400_000)],
        work=WorkReport(quantized=8_870_000, copied=4_550_000),
        deployment=SimpleNamespace(steps=steps),
    )
    seen = Calibration(Seen("g", "float", "t"), torch.tensor([256, 256]), {}, {MODULE: torch.tensor([3, 0])})
    report = SimpleNamespace(
        out=out, input_kind="checkpoint folder", structural_hash="a0724a47d723" * 2, target=Target.ASCEND,
        ledger=ledger,
        policy=SimpleNamespace(name=POLICIES[0]), unused_rules=[], output=output, verification=verification(),
        calibration=seen, contract=load_contract(Target.ASCEND), unverified=["W8A8_MIX on routed_expert (a, b)"],
        choices=["group_size auto → 256: it loads groups of 256"], reserves=["accepted (read): W8A8 on attention"],
        notes=[f"made {out.parent}"], serve=serve_line(Target.ASCEND, out),
        graph_only=False,
    )  # fmt: skip
    return SimpleNamespace(**{**vars(report), **changes})


def plan() -> Plan:
    shard = "quant_model_weight_w8a8-{:05}-of-00083.safetensors"
    return Plan(
        rows=[PlanRow(Kind.ROUTED_EXPERT, "W4A8_DYNAMIC", 44_544, 653_908_770_816, 1_307_817_541_632, 335_347_187_712)],
        work={"int4 of bf16": 10**9},
        files={shard.format(i): 4_291_103_744 for i in range(1, 84)},
        documents={"quant_model_weight_w8a8.safetensors.index.json": 20_327_586},
        operators=(1940, 4268),
        unverified=[],
        choices=[],
        reserves=[],
        serve="serve OUT",
        whole=0,
        model=Path("fxquant/models/deepseek_v3_671b.json"),
        input_kind="config.json",
        policy=POLICIES[0],
        target=Target.SGLANG_NPU,
        machine=Machine(cores=32, kernels={"int4 of bf16": 2.0}, disk_read=3.0, disk_write=3.0, disk_unknown=""),
        time=Estimate(32, 400.0, 110.0, {"int4 of bf16": 0.2}, 6.8),
        memory=Memory(469_000_000, 149_000_000, 32),
    )


def deployed() -> list[Deployment]:
    words = "o_proj: W4A8_DYNAMIC on attention: no such kernel"
    return [
        Deployment(policy, target, ranks, Verdict.REFUSED, words)
        for policy in POLICIES
        for target in Target
        for ranks in RANKS
    ]


def show_losses(to: Terminal) -> None:
    to.print(sensitivity.modules_table(losses(), "16 tokens"))
    to.print(sensitivity.groups_table(losses()))


NAMED: dict[str, tuple[Callable[[Terminal], None], list[str]]] = {
    "compare": (
        show_comparison,
        [*POLICIES, "0.00350–0.00410", "95.40%", "+0.00007", "-0.00013 to +0.00031", "not distinguishable"],
    ),
    "eval": (
        lambda to: to.print(evaluation_table("text", evaluation(), {ENGINE: 12.01})),
        ["float", "quantized", ENGINE, "0.0035–0.0041", "12.0100"],
    ),
    "sensitivity": (show_losses, [MODULE.format(2), "model.layers.1", "shared_expert", "all quantized at once"]),
    "verify": (
        lambda to: to.print(verification_tables(verification())),
        ["files: digest", "vllm-ascend-per-group: activations == graph", "80 of 46,000", "last-bit noise", "0.064"],
    ),
    "plan": (
        lambda to: print_plan(plan(), to),
        ["routed_expert", "1,307,817,541,632", "quant_model_weight_w8a8-00083-of-00083.safetensors", "index.json"],
    ),
    "targets": (
        lambda to: targets.print_table(deployed(), list(RANKS), to),
        [*POLICIES, *(target.value for target in Target), "✗ 1"],
    ),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("verb", NAMED)
def test_every_name_is_whole(verb: str, width: int) -> None:
    show, names = NAMED[verb]
    text = printed(width, show)
    flat = " ".join(text.replace("│", " ").split())
    assert [name for name in names if name not in text and " ".join(name.split()) not in flat] == [], text
    assert "…" not in text.replace("… 79 more", "") and max(map(len, text.splitlines())) <= max(width, 90), text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("verb", ["compare", "eval", "sensitivity", "verify", "targets"])
def test_a_table_fits_the_screen(verb: str, width: int) -> None:
    assert max(map(len, printed(width, NAMED[verb][0]).splitlines())) <= max(width, len(MODULE) + 8)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_compile_says_how_to_serve_in_one_line(width: int, tmp_path: Path) -> None:
    out = tmp_path / "an output"
    out.mkdir()
    (out / "tokenizer.json").touch()
    report = compile_report_of(out)
    lines = printed(width, lambda to: print_report(report, to)).splitlines()
    (serve,) = [line for line in lines if line.startswith("vllm serve")]
    assert shlex.split(serve)[:4] == ["vllm", "serve", str(out), "--quantization"] and str(out) in lines
    (shown,) = [line for line in lines if line.startswith("fxquant show")]
    assert shlex.split(shown) == ["fxquant", "show", str(out), "--fused"]
    text = " ".join(" ".join(lines).replace("│", " ").split())
    assert "attention at *.kv_b_proj → FLOAT" in text and "1.31 TB" in text
    assert f"made {out.parent}" in text
    assert (
        "calibrated on 512" not in text and f"1 of 2 experts saw no token of the calibration text ({MODULE}: 1)" in text
    )


def test_a_folder_without_a_tokenizer_is_not_said_to_serve(tmp_path: Path) -> None:
    text = printed(LOG_WIDTH, lambda to: print_report(compile_report_of(tmp_path), to))
    assert "vllm serve" not in text and "without tokenizer files (tokenizer.json" in text
    told = {"contract": load_contract(Target.ONNX), "serve": serve_line(Target.ONNX, tmp_path)}
    onnx = compile_report_of(tmp_path, target=Target.ONNX, **told)
    text = printed(LOG_WIDTH, lambda to: print_report(onnx, to))
    assert f"ort.InferenceSession('{tmp_path}/model.onnx', options)" in text and "tokenizer" not in text


@pytest.mark.parametrize("tokens, told", [([1, 1], True), ([511], True), ([256, 256], False)])
def test_few_calibration_tokens_are_told(tokens: list[int], told: bool) -> None:
    seen = SimpleNamespace(calibration=SimpleNamespace(tokens=torch.tensor(tokens)))
    line = few_tokens_line(seen)  # type: ignore[arg-type]
    assert (f"calibrated on {sum(tokens)} tokens" in line) is told and ("--calib" in line) is told
    assert few_tokens_line(SimpleNamespace(calibration=None)) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", ["/a/plain", "/with space/it's", "/$(reboot)"])
@pytest.mark.parametrize("target", [Target.ASCEND, Target.VLLM_ASCEND, Target.SGLANG_NPU])
def test_serve_lines_can_be_pasted(target: Target, folder: str) -> None:
    assert folder in shlex.split(serve_line(target, folder))


def test_the_line_for_onnx_is_python() -> None:
    text = serve_line(Target.ONNX, "/it's")
    assert text.endswith("""; session = ort.InferenceSession("/it's/model.onnx", options)""") and ast.parse(text)


def test_the_ways_of_a_table() -> None:
    """As it is, headings on several lines, sentences wrapped, stacked."""
    table = NamedTable("title", ("name", "a long heading", "why"), prose=("why",))
    table.add_row("model.layers.3", "12", "word " * 20)
    shapes = [printed(width, lambda to: to.print(table)).splitlines() for width in (160, 130, 70, 30)]
    assert "┃ name           ┃ a long heading ┃ why" in shapes[0][2]
    assert [len(lines) for lines in shapes[:2]] == [6, 7] and "heading" in shapes[1][3]
    assert len(shapes[2]) > 7 and all(len(line) <= 70 for line in shapes[2])
    assert shapes[3][:4] == [
        "title",
        "model.layers.3",
        "  a long heading 12",
        "  why word word word word",
    ]


def test_the_few_sentences_of_a_table_are_below_it() -> None:
    table = NamedTable("", ("check", "checked", "why"), prose=("why",))
    for name, why in (("one", ""), ("two", ""), ("three", "at " + MODULE), ("a check of a long name", "")):
        table.add_row(name, "1,234", why)
    lines = printed(90, lambda to: to.print(table)).splitlines()
    assert lines[1].split() == ["┃", "check", "┃", "checked", "┃", "why", "┃"]
    assert MODULE in printed(66, lambda to: to.print(table))
    lines = printed(50, lambda to: to.print(table)).splitlines()
    assert lines[1].split() == ["┃", "check", "┃", "checked", "┃"] and lines[-2:] == ["three: at", f"    {MODULE}"]


def test_a_table_without_rows() -> None:
    assert printed(20, lambda to: to.print(NamedTable("title", ("name", "a long heading", "another"))))
