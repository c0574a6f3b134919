"""Readers of our ONNX models: python benchmarks/onnx_consumers.py [--newest] [--write] [MODEL]

Compiles MODEL, else the shipped example, for ONNX: in float, and under the default policy in each profile. Each reader
loads the folders and runs a prompt and a step after it, and the table says how far its logits are from ONNX Runtime's,
or what it says instead. Packages that are not here are downloaded once a machine. --newest takes their newest versions,
--write puts the table into docs/onnx.md.
"""

import argparse
import json
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from genai import VERSION, greedy
from onnx_readers import DOWNLOADED, HERE, table, write_feeds
from places import EXAMPLE, ROOT

from fxquant import CompileOptions, compile, convert
from fxquant.compilation.onnx_options import OnnxOptions
from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.engines.table import Target
from fxquant.generation.greedy import greedy as decode
from fxquant.lowering.onnx.required import stored_form
from fxquant.lowering.onnx.runner import OnnxRunner

PAGE = ROOT / "docs" / "onnx.md"
PROMPTS, STEPS = [[0, 909, 651, 73], [0, 85, 345, 296], [0, 261, 521]], 32
"""What onnxruntime-genai continues, and for how many tokens."""
BEGIN, END = "<!-- ONNX readers -->", "<!-- end of ONNX readers -->"
GRAPHS = {
    "float": ("float", OnnxProfile.QDQ),
    "qdq": ("deepseek_w4a8", OnnxProfile.QDQ),
    "integer": ("deepseek_w4a8", OnnxProfile.INTEGER),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--newest", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    readers = [reader.newest if options.newest else reader for reader in (*HERE, *DOWNLOADED)]
    lines = []
    with tempfile.TemporaryDirectory(prefix="fxquant-readers-") as folder:
        scratch = Path(folder)
        folders = {name: _compiled(options.model, *graph, scratch / name) for name, graph in GRAPHS.items()}
        config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
        width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        write_feeds(scratch, config["vocab_size"], [width] * config["num_hidden_layers"])
        for line in chain(table(folders, readers, scratch), [genai_row(folders, scratch, options.newest)]):
            print(line, flush=True)
            lines.append(line)
    if options.write:
        _write("\n".join(lines))


def genai_row(folders: dict[str, Path], scratch: Path, newest: bool) -> str:
    """onnxruntime-genai: the same graphs with their caches in halves, by the greedy tokens after a few prompts."""
    answers = {}
    for title, folder in folders.items():
        halves = scratch / f"{title}-halves"
        form = stored_form(folder)
        options = OnnxOptions(onnx_profile=form.profile, onnx_cache=OnnxCache.HALVES)
        convert(folder, Target.ONNX, halves, verify=False, onnx=options)
        answers[title] = halves, greedy(halves, PROMPTS, STEPS, "" if newest else VERSION)
    cells = [_said(*answer) for answer in answers.values()]
    version = next((answer["version"] for _, answer in answers.values() if "tokens" in answer), VERSION)
    return f"| onnxruntime-genai, caches in halves | {version} | {' | '.join(cells)} |"


def _said(folder: Path, answer: dict[str, Any]) -> str:
    if "tokens" not in answer:
        return f"stops: {' '.join(answer['words'])}"
    runner = OnnxRunner(folder)
    ours = [[int(logits[0].argmax()) for logits in decode(runner, [prompt], STEPS, 1)] for prompt in PROMPTS]
    # a text that ended is shorter
    same = all(mine[: len(theirs)] == theirs for mine, theirs in zip(ours, answer["tokens"], strict=True))
    return "runs, equal tokens" if same else "runs, other tokens"


def _compiled(model: Path, policy: str, profile: OnnxProfile, out: Path) -> Path:
    compile(model, CompileOptions(policy=policy, out=out, target=Target.ONNX, onnx_profile=profile, verify=False))
    return out


def _write(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, mark, rest = page.partition(BEGIN)
    if not mark:
        raise SystemExit(f"{PAGE}: no mark {BEGIN}")
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
