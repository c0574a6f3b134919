"""Texts of the ONNX graphs of a model, and KL from its rewritten graph: python benchmarks/onnx_text.py [MODEL]

MODEL, else the shipped example, is quantized under each policy, and the same integers are written as each ONNX graph.
All of them write greedily after the beginnings of the documents of --text, of unequal lengths, in one batch. A text
that differs says at which token it first does: `29: 0.0024 of 0.18` is token 29, where the rewritten graph prefers its
own token to the next best by 0.0024, and last-bit noise alone moves a logit of that text by up to 0.18. KL and top-1
agreement are over prompts and texts; last-bit noise has them over the same tokens.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from greedy_texts import GreedyTexts
from onnx_texts import Compared, compare, greedy_texts, noise, write_graphs
from places import EXAMPLE

from fxquant.runtime.divergence import Divergence
from fxquant.tools.console import console, errors

POLICIES = ("deepseek_w4a8", "deepseek_w8a8", "float")
HEADINGS = ("policy", "graph", "equal texts", "first differing tokens", "KL per token", "largest KL", "top-1")


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--policy", action="append", dest="policies", help=f"default: {', '.join(POLICIES)}")
    parser.add_argument("--text", type=Path, default=EXAMPLE / "evaluation.jsonl")
    parser.add_argument("--calib", type=Path, help="default: the text beside the model")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=128)
    options = parser.parse_args()
    print_row(HEADINGS)
    print_row(["---"] * len(HEADINGS))
    for policy in options.policies or POLICIES:
        with tempfile.TemporaryDirectory(prefix="fxquant-text-") as folder:
            errors.print(f"compiling {policy}")
            outs = write_graphs(options.model, policy, options.calib, Path(folder))
            texts = greedy_texts(next(iter(outs.values())), options.text, options.prompts, options.steps)
            for name, out in outs.items():
                errors.print(f"comparing {policy}, {name}")
                compared = compare(out, texts)
                print_row([policy, name, *told(compared, texts), *figures(compared.distance)])
            print_row([policy, "last-bit noise", "", "", *figures(noise(texts))])


def told(compared: Compared, texts: GreedyTexts) -> list[str]:
    """How many texts are equal, and the first tokens that differ."""
    places = [f"{found.step}: {found.margin:.2g} of {moves:.2g}" for found, moves in compared.differences]
    return [f"{compared.texts - len(places)} of {len(texts.prompts)}", ", ".join(places)]


def figures(distance: Divergence) -> list[str]:
    """KL and top-1 agreement."""
    return [f"{distance.kl_mean:.2g}", f"{distance.kl_max:.2g}", f"{distance.top1_agreement:.2%}"]


def print_row(cells: list[str] | tuple[str, ...]) -> None:
    """One line of Markdown."""
    console.print("| " + " | ".join(cells) + " |", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
