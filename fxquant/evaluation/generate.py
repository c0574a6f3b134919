"""Greedy generation from an output folder, token by token with the latent cache."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.program.program import Program
from fxquant.runtime.execute import generate
from fxquant.runtime.weight_providers import Read
from fxquant.text.load import bos_ids
from fxquant.text.tokenizer import BoundedTokenizer, open_tokenizer


def greedy_text(folder: Path, program: Program, read: Read, prompt: str, max_new_tokens: int) -> Iterator[str]:
    """The continuation of `prompt`, piece by piece, until an end token. An empty prompt raises FxquantError at once."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        fact = f"not valid text: {error.object[error.start]!a} is half a character."
        raise FxquantError("--prompt", fact, "Pass it as UTF-8.") from None
    tokenizer = open_tokenizer(folder)
    ids = bos_ids(Checkpoint(folder, program.config, {})) + tokenizer.encode(prompt)
    if not ids:
        raise FxquantError("--prompt", "contains no tokens.", "Pass some text.")
    return text_pieces(tokenizer, step_logits(folder, program, read, ids, max_new_tokens), end_ids(program))


def end_ids(program: Program) -> set[int]:
    """The tokens that end a text."""
    stop = program.config.get("eos_token_id")
    return {token for token in (stop if isinstance(stop, list) else [stop]) if isinstance(token, int)}


def text_pieces(tokenizer: BoundedTokenizer, steps: Iterable[Tensor], stops: set[int]) -> Iterator[str]:
    """The best token of each step's logits [vocabulary] as text, whole characters at a time, until one of `stops`."""
    written, new = "", []
    for logits in steps:
        token = int(logits.argmax())
        if token in stops:
            return
        new.append(token)
        text = tokenizer.decode(new)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else the character continues in the next token
            yield text[len(written) :]
            written = text


def step_logits(folder: Path, program: Program, read: Read, ids: list[int], steps: int) -> Iterator[Tensor]:
    """float32 [vocabulary] per step of greedy decoding with the cache."""
    if (folder / "model.onnx").is_file():
        from fxquant.lowering.onnx.required import require_emitted
        from fxquant.lowering.onnx.runner import OnnxRunner
        from fxquant.lowering.output_folder.weight_files import WeightFiles

        require_emitted(program, WeightFiles(folder).infos, folder)
        return OnnxRunner(folder).generate(ids, steps)
    return generate(program, read, ids, steps)
