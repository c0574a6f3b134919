"""Prompts: texts, chats and token ids, from the command line or a file, to the ids that the model runs on."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.inputs.limits import TEXT_BYTES
from fxquant.text.documents import Chat, Document, read_documents
from fxquant.text.load import Encoder
from fxquant.text.token_ids import check_vocabulary

FORMATS = ".txt with a prompt per line; .json or .jsonl of texts, chats or token ids"
STDIN = "-"


@dataclass(frozen=True)
class Prompt:
    """A text, chat or list of token ids; `place` is where it stands, for errors and results."""

    place: str
    document: Document


@dataclass(frozen=True)
class Encoded:
    """A prompt as ids. `text` is what the model's text continues: empty for a chat and for token ids."""

    place: str
    text: str
    ids: list[int]


def text_prompt(text: str, place: str = "--prompt") -> Prompt:
    """A text as it is. Raises FxquantError for half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fact = f"not valid text: {error.object[error.start]!a} is half a character."
        raise FxquantError(place, fact, "Pass it as UTF-8.") from None
    return Prompt(place, text)


def stdin_prompt() -> Prompt:
    """All of stdin, without the newline at its end."""
    data = sys.stdin.buffer.read(TEXT_BYTES + 1)
    if len(data) > TEXT_BYTES:
        raise FxquantError("stdin", f"more than {TEXT_BYTES:,} bytes.", "Pass a shorter prompt.")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FxquantError("stdin", f"not valid UTF-8: {error}.", "Pass it as UTF-8.") from None
    return Prompt("stdin", text.removesuffix("\n").removesuffix("\r"))


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a file, in its order; empty lines are none. Raises FxquantError if it has none."""
    if not file.is_file():
        raise FxquantError(file, "not a regular file." if file.exists() else "no such file.", f"Pass {FORMATS}.")
    if file.suffix not in (".txt", ".json", ".jsonl"):
        raise FxquantError(file, f"unsupported suffix {file.suffix or '(none)'}.", f"Pass {FORMATS}.")
    try:
        entries: Iterable[tuple[str, Document]] = _lines(file) if file.suffix == ".txt" else read_documents(file)
        prompts = [Prompt(place, document) for place, document in entries]
    except UnicodeDecodeError as error:
        raise FxquantError(file, f"not valid UTF-8: {error}.", "Save it as UTF-8.") from None
    except OSError as error:
        raise FxquantError(file, f"cannot be read: {error.strerror}.", f"Pass {FORMATS}.") from None
    if not prompts:
        raise FxquantError(file, "holds no prompt.", f"Pass {FORMATS}.")
    return prompts


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    with file.open(encoding="utf-8") as lines:
        number = 0
        while line := lines.readline(TEXT_BYTES):
            number += 1
            if len(line) == TEXT_BYTES:
                fact = f"a line of {TEXT_BYTES:,} characters or more."
                raise FxquantError(f"{file}:{number}", fact, "A .txt file has one prompt per line.")
            if line.strip():
                yield f"{file}:{number}", line.removesuffix("\n")


@dataclass(frozen=True)
class PromptEncoder:
    """Prompts to ids, each text with the model's BOS once.

    chat     texts are what a user says to the model; without it only chats of a file are chats
    system   the message before each chat, or None
    context  positions of the model; a prompt must leave room for one more token
    """

    encoder: Encoder
    checkpoint: Checkpoint
    chat: bool
    system: str | None
    context: int

    def __call__(self, prompt: Prompt) -> Encoded:
        """Raises FxquantError for a prompt without tokens, or too long for the model."""
        document = prompt.document
        if isinstance(document, str) and self.chat:
            document = Chat([{"role": "user", "content": document}])
        if isinstance(document, list):
            check_vocabulary(Path(prompt.place), [torch.tensor(document)], self.checkpoint)
            encoded = Encoded(prompt.place, "", document)
        elif isinstance(document, Chat):
            text = self.encoder.template.render(self._messages(prompt.place, document), prompt.place, answer=True)
            encoded = Encoded(prompt.place, "", self.encoder.bos + self.encoder.encode(text))
        else:
            encoded = Encoded(prompt.place, document, self.encoder.bos + self.encoder.encode(document))
        self._check(encoded)
        return encoded

    def _messages(self, place: str, chat: Chat) -> list[dict[str, Any]]:
        if self.system is None:
            return chat.messages
        if chat.messages[:1] and chat.messages[0]["role"] == "system":
            raise FxquantError(place, "has a system message of its own.", "Leave out --system.")
        return [{"role": "system", "content": self.system}, *chat.messages]

    def _check(self, encoded: Encoded) -> None:
        if not encoded.ids:
            raise FxquantError(encoded.place, "contains no tokens.", "Pass some text.")
        if len(encoded.ids) >= self.context:
            fact = f"{len(encoded.ids):,} tokens, but the model has {self.context:,} positions."
            raise FxquantError(encoded.place, fact, f"Pass at most {self.context - 1:,} tokens.")
