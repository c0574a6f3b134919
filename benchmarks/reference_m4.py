"""m4 smoothing of the reference quantizer and ours, number by number: python benchmarks/reference_m4.py [MODELS]

Both smooth the same checkpoint on the same token ids: the tool's older library as reference_w4a8.py calls it, in the
environment that reference_quantizer.py makes, and `deepseek_w4a8_msmodelslim_m4` for target ascend. Printed is, for
each kind of number, the largest relative difference over all layers, and the mean. A scale between the values of the
attention and o_proj is in no file: kv_b_proj stays float, and its rows of values are the source's over the scale.

The tool runs the model in its own dtype, bfloat16, and once more in float32: what then is left is not its rounding of
activations.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from reference_quantizer import HERE, MODELS, NAMES, environment, give, timed
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.foreign.found import FoundFolder, find_folder
from fxquant.frontend.source import Source, open_source
from fxquant.text.load import load_batches
from fxquant.tools.console import console

POLICY = "deepseek_w4a8_msmodelslim_m4"
DTYPES = ("bfloat16", "float32")
DESCRIPTION = "quant_model_description.json"
HEADINGS = ("model", "tool runs in", "numbers", "count", "largest difference", "above 1 %", "mean difference")
Numbers = Callable[[FoundFolder, Checkpoint, str], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="?", default=MODELS)
    parser.add_argument("--names", nargs="*", default=NAMES, help="checkpoints of MODELS")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=256)
    options = parser.parse_args()
    if not options.models.is_dir():
        print(f"{options.models}: no such folder; pass a folder of checkpoints with a calib.txt")
        return 2
    python = environment()
    table = Table(*HEADINGS, title=f"{POLICY} / reference")
    for name in options.names:
        with tempfile.TemporaryDirectory() as place:
            source = open_source(options.models / name)
            windows = load_batches(options.models / "calib.txt", source.checkpoint, options.samples, options.seq_len)
            ours, *others = outputs(source, windows, python, Path(place))
            for dtype, theirs in zip(DTYPES, others, strict=True):
                for row in differences(theirs, ours, source):
                    table.add_row(name, dtype, *row)
    console.print(table)
    return 0


def outputs(source: Source, windows: list[Tensor], python: Path, place: Path) -> Iterator[FoundFolder]:
    """Our folder and the tool's of each of `DTYPES`, calibrated on the same ids: those that it makes of the texts."""
    model, calib, ids = place / "model", place / "calib.json", place / "ids.jsonl"
    model.mkdir(mode=0o750)
    give(source.checkpoint, model)
    tokenizer = Tokenizer.from_file(str(source.checkpoint.folder / "tokenizer.json"))
    texts = [tokenizer.decode(window[0].tolist()) for window in windows]
    calib.write_text(json.dumps(texts), encoding="utf-8")
    ids.write_text("".join(json.dumps(tokenizer.encode(text).ids) + "\n" for text in texts), encoding="utf-8")
    ours = place / "ours"
    command = [sys.executable, "-m", "fxquant", "compile", source.path, "--policy", POLICY, "--target", "ascend"]
    command += ["--calib", ids, "--samples", len(texts), "--seq-len", max(map(len, texts)), "-o", ours]
    subprocess.run(list(map(str, [*command, "--no-verify", "--no-export", "--quiet"])), check=True)
    yield find_folder(ours, DESCRIPTION)
    for dtype in DTYPES:
        theirs = place / dtype
        timed([python, HERE / "reference_w4a8.py", model, theirs, calib, dtype], place / f"{dtype}.log")
        shutil.copyfile(source.checkpoint.folder / "config.json", theirs / "config.json")
        yield find_folder(theirs, DESCRIPTION)


def differences(theirs: FoundFolder, ours: FoundFolder, source: Source) -> Iterator[tuple[str, ...]]:
    """A row for each kind of number that both have."""
    config, checkpoint = source.config, source.checkpoint
    heads, width = config.num_attention_heads, config.v_head_dim

    def value_scales(found: FoundFolder, checkpoint: Checkpoint, layer: str) -> Tensor:
        name = f"{layer}.self_attn.kv_b_proj.weight"
        stored, whole = (
            folder.read(name).double().view(heads, -1, config.kv_lora_rank)[:, -width:].flatten(0, 1)
            for folder in (found, checkpoint)
        )
        return (whole * whole).sum(1) / (whole * stored).sum(1)

    def norm_scales(found: FoundFolder, checkpoint: Checkpoint, layer: str) -> Tensor:
        name = f"{layer}.input_layernorm.weight"
        return checkpoint.read(name).double() / found.read(name).double()

    kinds: dict[str, Numbers] = {
        "scales of o_proj's inputs": value_scales,
        "scales of input_layernorm": norm_scales,
    }
    for linear in ("q_a_proj", "q_b_proj", "o_proj"):
        kinds[f"input_scale of {linear}"] = lambda found, _, layer, linear=linear: found.read(
            f"{layer}.self_attn.{linear}.input_scale"
        ).double()
    for kind, numbers in kinds.items():
        layers = [f"model.layers.{number}" for number in range(config.num_hidden_layers)]
        reference = torch.cat([numbers(theirs, checkpoint, layer).flatten() for layer in layers])
        off = (torch.cat([numbers(ours, checkpoint, layer).flatten() for layer in layers]) / reference - 1).abs()
        yield kind, f"{len(off):,}", f"{off.max():.2%}", f"{int((off > 0.01).sum())}", f"{off.mean():.2%}"


if __name__ == "__main__":
    sys.exit(main())
