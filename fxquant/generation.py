"""Greedy text from an output folder, token by token with the latent cache."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from fxquant.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.execute import generate
from fxquant.program import Program
from fxquant.text import bos_ids, open_tokenizer
from fxquant.weights import Read


def greedy_text(folder: Path, program: Program, read: Read, prompt: str, max_new_tokens: int) -> Iterator[str]:
    """What follows `prompt`, piece by piece, until an end token; raises FxquantError for an empty prompt."""
    tokenizer = open_tokenizer(folder)
    ids = bos_ids(Checkpoint(folder, program.config, {})) + tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise FxquantError("--prompt", "holds no token.", "Give some text.")
    stop = program.config.get("eos_token_id")
    stops = set(stop) if isinstance(stop, list) else {stop}
    written, new = "", []
    for logits in step_logits(folder, program, read, ids, max_new_tokens):
        token = int(logits.argmax())
        if token in stops:
            return
        new.append(token)
        text = tokenizer.decode(new)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(written) :]
            written = text


def step_logits(folder: Path, program: Program, read: Read, ids: list[int], steps: int) -> Iterator[Tensor]:
    """float32 [vocabulary] a step, decoding greedily with the cache."""
    if (folder / "model.onnx").is_file():
        from fxquant.lowering.onnx.runner import OnnxRunner

        return OnnxRunner(folder).generate(ids, steps)
    return generate(program, read, ids, steps)
