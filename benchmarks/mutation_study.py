"""Edits of the kinds that researchers make, each compiled as edited or refused: none as the plain model.

    python benchmarks/mutation_study.py [--only TEXT] [--checkpoint DIR] [--write]

For each edit: the graph's hash differs from the plain model's, and on other tokens than those of the compiler's own
proof its logits agree with the file's eager forward (`agrees`), or the compiler refuses, with the first line of why.
--write puts the table into docs/edits.md.
"""

import argparse
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from published_style import style_published  # noqa: E402

from fxquant.checkpoint.checkpoint import open_config  # noqa: E402
from fxquant.checkpoint.config import parse_config  # noqa: E402
from fxquant.errors import FxquantError  # noqa: E402
from fxquant.frontend.build import build_model, trace_file  # noqa: E402
from fxquant.frontend.families import family_of  # noqa: E402
from fxquant.frontend.proof.copies import Tokens, wide_config  # noqa: E402
from fxquant.frontend.proof.eager import eager_logits  # noqa: E402
from fxquant.frontend.proof.prove import traced_copy  # noqa: E402
from fxquant.frontend.proof.traced import traced_logits  # noqa: E402
from fxquant.frontend.user_file import open_user_file  # noqa: E402
from fxquant.program.program_file import parse_program  # noqa: E402
from fxquant.program.structural_hash import structural_hash  # noqa: E402

MUTATIONS = ROOT / "benchmarks" / "mutations.yaml"
PAGE, BEGIN, END = ROOT / "docs" / "edits.md", "<!-- edits -->", "<!-- end of edits -->"
STYLE = ROOT / "tests" / "model_files" / "deepseek_style.py"


def edits() -> Iterator[tuple[str, str, str]]:
    """(base, name, text of the model file)."""
    document = yaml.safe_load(MUTATIONS.read_text())
    text = STYLE.read_text()
    for name, replacements in document["deepseek"].items():
        edited = text
        for each in replacements:
            assert edited.count(each["old"]) == 1, (name, each["old"])
            edited = edited.replace(each["old"], each["new"])
        yield "DeepSeek's file", name, edited
    for name, parts in document["transformers"]["edits"].items():
        places = {"code": "", "layer": "pass", "model": "pass"} | parts
        yield "transformers", name, document["transformers"]["file"].format(**places)
    for name, code in document["own"]["edits"].items():
        yield "fxquant.models", name, document["own"]["file"].format(code=code)


def outcome(path: Path, checkpoint: Path, plain: str) -> str:
    """What became of the file at `path`."""
    try:
        program = parse_program(trace_file(path, checkpoint).program, path)
    except FxquantError as error:
        return f"refused: {error.place}: {error.fact}".split("\n")[0]
    if structural_hash(program) == plain:
        return "WRONG: compiled as the plain model"
    error = disagreement(path, checkpoint)
    return f"compiled as edited, agrees to {error:.1e}" if error < 1e-3 else f"WRONG: off by {error:.1e}"


@torch.no_grad()
def disagreement(path: Path, checkpoint: Path) -> float:
    """Largest difference of logits between graph and eager forward on 121 and 60 tokens, relative to their rms."""
    config = wide_config(parse_config(open_config(checkpoint).config, checkpoint))
    with open_user_file(path) as file:
        copy = traced_copy(file, config, lambda small, device: build_model(file, small, device), 0.5)
        assert copy is not None
        ids = torch.randint(config.vocab_size, (2, 123), generator=torch.Generator().manual_seed(11))
        tokens = Tokens(ids, (121, 60), 2)
        eager = eager_logits(copy.model, family_of(copy.model), tokens)
        return float(
            (traced_logits(copy.program, copy.tensors, tokens) - eager).abs().max() / eager.pow(2).mean().sqrt()
        )


def main() -> int:
    """Print a table; exit code 1 if an edit was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="edits whose base and name have this text")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "tiny_deepseek_v3")
    parser.add_argument("--write", action="store_true", help="put the table into docs/edits.md")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write takes all edits")
    torch.set_num_threads(1)
    lines = ["| file | edit | outcome |", "|---|---|---|"]
    print("\n".join(lines))
    for line in study(options.only, options.checkpoint):
        print(line, flush=True)
        lines.append(line)
    lost = sum("| WRONG" in line for line in lines)
    counted = f"{len(lines) - 2} edits: {sum('| compiled as' in line for line in lines)} compiled as edited, "
    counted += f"{sum('| refused' in line for line in lines)} refused, {lost} lost."
    print(f"\n{counted}")
    if options.write:
        before, mark, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        table = "\n".join([mark, counted, "", *lines, END])
        PAGE.write_text(before + table + rest.partition(END)[2], encoding="utf-8")
    return 1 if lost else 0


def study(only: str, checkpoint: Path) -> Iterator[str]:
    """A row for each edit."""
    with tempfile.TemporaryDirectory() as folder, style_published():
        path = Path(folder) / "model.py"
        path.write_text(STYLE.read_text())
        plain = structural_hash(parse_program(trace_file(path, checkpoint).program, path))
        for base, name, text in edits():
            if only in f"{base}: {name}":
                path.write_text(text)
                said = outcome(path, checkpoint, plain)
                for place in (folder, sysconfig.get_path("purelib")):
                    said = said.replace(f"{place}/", "")
                said = said.replace("|", "\\|")[:180]
                yield f"| {base} | {name} | {said} |"


if __name__ == "__main__":
    sys.exit(main())
