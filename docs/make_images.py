"""Draw the pictures of README and docs with the project's own commands: python docs/make_images.py

With --widths FOLDER, instead what compile, verify, plan, eval and compare print, on screens of 80 and 120 columns as
SVG and in a log as text, to look at.
"""

import argparse
import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import draw_onnx_layer

from fxquant import CompileOptions, compare, compile, convert, evaluate, plan
from fxquant.api import open_graph, sensitivity
from fxquant.engines.table import Target
from fxquant.planning.support_matrix import RANKS, deployments, float_program
from fxquant.policy.policy import load_policy
from fxquant.program.text import format_program
from fxquant.tools import targets
from fxquant.tools.compare import comparison_table
from fxquant.tools.compile_report import print_report
from fxquant.tools.console import LOG_WIDTH, Terminal
from fxquant.tools.draw_sensitivity import draw
from fxquant.tools.evaluate import evaluation_table
from fxquant.tools.plan import print_plan
from fxquant.tools.verify import verification_tables

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "tiny_deepseek_v3"
TEXT = EXAMPLE / "evaluation.jsonl"
COMPARED = ["deepseek_w4a8_msmodelslim_m4", "deepseek_w8a8", "float"]


def main() -> None:
    """Compile the example, and save what the terminal shows as SVG."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tiny_w4a8"
        report = compile(EXAMPLE / "model.py", CompileOptions(policy="deepseek_w4a8", out=out))
        screen = _screen(104)
        screen.print(
            "$ fxquant compile examples/tiny_deepseek_v3/model.py -p deepseek_w4a8 -o out/tiny_w4a8", style="bold"
        )
        report.out = Path("out/tiny_w4a8")
        print_report(report, screen)
        _save(screen, "compile.svg", "fxquant compile")
        lines = list(format_program(open_graph(out), "model.layers.3"))
        first = next(index for index, line in enumerate(lines) if "router_logits" in line)
        last = next(index for index, line in enumerate(lines) if "finalize_routing(" in line)
        screen = _screen(132)
        screen.print("$ fxquant show out/tiny_w4a8 --block model.layers.3", style="bold")
        for line in lines[first : last + 1]:
            screen.print(line, highlight=False, markup=False)
        _save(screen, "expert_layer.svg", "fxquant show: an expert layer in integers")
        draw(sensitivity(out, TEXT), HERE / "images" / "sensitivity.svg")
        onnx = convert(out, Target.ONNX, Path(folder) / "tiny_onnx").out
        draw_onnx_layer.main(onnx, HERE / "images" / "onnx_layer.svg")

    names = ["deepseek_w4a8", "deepseek_w4a8_per_channel", "deepseek_w4a8_shared_w4", "deepseek_w8a8_mix"]
    screen = _screen(110)
    screen.print("$ fxquant targets --table " + " ".join(f"-p {name}" for name in names), style="bold")
    verdicts = deployments(float_program(), [load_policy(name) for name in names], list(Target))
    targets.print_table(verdicts, list(RANKS), screen)
    _save(screen, "targets.svg", "fxquant targets: DeepSeek-V3 671B")


def widths(folder: Path) -> None:
    """What five verbs print, as `<verb>_80.svg`, `<verb>_120.svg` and `log.txt` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    report = compile(EXAMPLE, CompileOptions(out=folder / "out" / "tiny_w4a8", force=True, export=False))
    assert report.verification is not None
    verification, planned = report.verification, plan(EXAMPLE)
    evaluated, compared = evaluate(report.out, TEXT, samples=4), compare(EXAMPLE, COMPARED, TEXT, samples=4)
    shown: dict[str, Callable[[Terminal], None]] = {
        "compile": lambda screen: print_report(report, screen),
        "verify": lambda screen: screen.print(verification_tables(verification)),
        "plan": lambda screen: print_plan(planned, screen),
        "eval": lambda screen: screen.print(evaluation_table(TEXT.name, evaluated, {})),
        "compare": lambda screen: screen.print(comparison_table(EXAMPLE.name, TEXT.name, compared)),
    }
    for verb, show in shown.items():
        for width in (80, 120):
            show(screen := _screen(width))
            screen.save_svg(str(folder / f"{verb}_{width}.svg"), title=f"fxquant {verb}, {width} columns")
    with (folder / "log.txt").open("w", encoding="utf-8") as file:
        for show in shown.values():
            show(Terminal(width=LOG_WIDTH, file=file))


def _save(screen: Terminal, name: str, title: str) -> None:
    """As SVG, without the fonts that rich names on a server: a picture that is viewed loads nothing."""
    svg = re.sub(r"\s*@font-face \{.*?\}\n", "", screen.export_svg(title=title), flags=re.DOTALL)
    (HERE / "images" / name).write_text(svg.replace("Fira Code", "ui-monospace, Menlo, Consolas"), encoding="utf-8")


def _screen(width: int) -> Terminal:
    return Terminal(record=True, width=width, file=io.StringIO())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=Path)
    given = parser.parse_args().widths
    widths(given) if given else main()
