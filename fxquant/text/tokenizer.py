"""Tokenizer: the tokenizer.json of a folder. It is untrusted and runs in a process with bounded time and memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxquant.errors import FxquantError
from fxquant.inputs.limits import (
    MIB,
    TEXT_SECONDS,
    TOKENIZER_BYTES,
    TOKENIZER_MEMORY,
    TOKENIZER_SECONDS,
)
from fxquant.processes.bounded_worker import BoundedWorker, WorkerError

AGAIN = "Copy the file again."
OTHERS = ("tiktoken.model", "tokenizer.model")
"""Tokenizers that code of the model reads, which is not run."""


class BoundedTokenizer:
    """Text to ids and back, without added special tokens, padding, truncation or dropout."""

    def __init__(self, file: Path) -> None:
        """Raises FxquantError if `file` is not a tokenizer."""
        self._file = file
        seconds = TOKENIZER_SECONDS * (1 + file.stat().st_size / (8 * MIB))
        self._worker = BoundedWorker("tokenizer", TOKENIZER_MEMORY, seconds, file=str(file.resolve()))
        try:
            self._worker.open()
        except WorkerError as fault:
            raise FxquantError(file, f"cannot be read: {fault}.", AGAIN) from None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. CPU limit: `TEXT_SECONDS`, plus the same again per 200,000 characters."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            fact = f"the text contains a lone surrogate, {error.object[error.start]!a}."
            raise FxquantError(self._file, fact, "Use valid UTF-8 text.") from None
        return self._ask("a text", TEXT_SECONDS * (1 + len(text) / 200_000), text=text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._ask("token ids", TEXT_SECONDS, ids=list(ids))

    def _ask(self, what: str, seconds: float, **request: object) -> Any:
        try:
            return self._worker.ask(seconds, **request)
        except WorkerError as fault:
            raise FxquantError(
                self._file, f"the tokenizer fails on {what}: {fault}.", f"{AGAIN} Or use token ids."
            ) from None


def open_tokenizer(folder: Path) -> BoundedTokenizer:
    """The folder's tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        other = next((f"; only the model's own code reads {name}" for name in OTHERS if (folder / name).is_file()), "")
        way_out = "Put it there, or use token ids (.npy, .safetensors)."
        raise FxquantError(folder, f"has no tokenizer.json{other}.", way_out)
    if (size := file.stat().st_size) > TOKENIZER_BYTES:
        raise FxquantError(file, f"{size:,} bytes, at most {TOKENIZER_BYTES:,} are read.", AGAIN)
    return BoundedTokenizer(file)
