"""Draw the pictures of README and docs with the project's own commands: python docs/make_images.py"""

import io
import tempfile
from pathlib import Path

from rich.console import Console

from fxquant import CompileOptions, compile
from fxquant.api import open_graph, sensitivity
from fxquant.deployments import RANKS, deployments, float_program
from fxquant.printing import format_program
from fxquant.targets import Target
from fxquant.tools import compile_model, targets
from fxquant.tools.draw_sensitivity import draw

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "tiny_deepseek_v3"


def main() -> None:
    """Compile the example, and save what the terminal shows as SVG."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out" / "tiny_w4a8"
        report = compile(EXAMPLE / "model.py", CompileOptions(policy="deepseek_w4a8", out=out))
        screen = Console(record=True, width=104, file=(Path(folder) / "screen").open("w"))
        screen.print(
            "$ fxquant compile examples/tiny_deepseek_v3/model.py -p deepseek_w4a8 -o out/tiny_w4a8", style="bold"
        )
        report.out = Path("out/tiny_w4a8")
        compile_model.print_report(report, screen)
        screen.save_svg(str(HERE / "images" / "compile.svg"), title="fxquant compile")
        lines = list(format_program(open_graph(out), "model.layers.3"))
        first = next(index for index, line in enumerate(lines) if "router_logits" in line)
        last = next(index for index, line in enumerate(lines) if "finalize_routing(" in line)
        screen = Console(record=True, width=132, file=(Path(folder) / "screen").open("w"))
        screen.print("$ fxquant show out/tiny_w4a8 --block model.layers.3", style="bold")
        for line in lines[first : last + 1]:
            screen.print(line, markup=False, highlight=False)
        screen.save_svg(str(HERE / "images" / "expert_layer.svg"), title="fxquant show: an expert layer in integers")
        draw(sensitivity(out, EXAMPLE / "evaluation.jsonl"), HERE / "images" / "sensitivity.svg")

    policies = ["deepseek_w4a8", "deepseek_w4a8_per_channel", "deepseek_w4a8_shared_w4", "deepseek_w8a8_mix"]
    screen = Console(record=True, width=110, file=io.StringIO())
    screen.print("$ fxquant targets --table " + " ".join(f"-p {name}" for name in policies), style="bold")
    targets.print_table(deployments(float_program(), policies, list(Target)), list(RANKS), screen)
    screen.save_svg(str(HERE / "images" / "targets.svg"), title="fxquant targets: DeepSeek-V3 671B")


if __name__ == "__main__":
    main()
