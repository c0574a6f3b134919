"""Calibration and evaluation text: files to token ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import dropwhile, islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fxquant.chat import ChatTemplate, open_chat_template
from fxquant.checkpoint import Checkpoint, token_ids_from
from fxquant.documents import Chat, Document, read_documents
from fxquant.errors import FxquantError

FORMATS = ".txt, .json or .jsonl of texts, chats or token ids, .npy or .safetensors of int64 [batches, length]"


def load_batches(file: Path, checkpoint: Checkpoint, samples: int, seq_len: int) -> list[Tensor]:
    """Token ids int64 [1, ≤ seq_len], at most `samples` of them.

    Text is tokenized and each piece starts with the model's BOS, once: a .txt is one running text cut into windows, a
    .json or .jsonl one piece a document, chats by the tokenizer's chat template. Token ids are taken as they are; rows
    of .npy and .safetensors, one a batch, are never cut.
    """
    if not file.is_file():
        raise FxquantError(file, "no such file.", f"Give {FORMATS}.")
    if file.suffix in (".npy", ".safetensors"):
        return _token_ids(file, checkpoint)[:samples]
    encoder = Encoder(checkpoint.folder, bos_ids(checkpoint))
    if seq_len <= len(encoder.bos):
        raise FxquantError(file, f"length {seq_len} leaves no room for text.", "Take at least 2 tokens a batch.")
    batches = [torch.tensor([ids]) for ids in islice(_pieces(file, encoder, seq_len), samples)]
    if not batches:
        raise FxquantError(file, "holds no text.", f"Give {FORMATS}.")
    _check_vocabulary(file, batches, checkpoint)
    return batches


@dataclass(frozen=True)
class Encoder:
    """Documents to token ids, by the tokenizer and the chat template of `folder`: each is read when first needed.

    bos  what a text starts with, [BOS] or nothing
    """

    folder: Path
    bos: list[int]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone. A BOS that is written at its start, as chat templates do, is left out."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return list(dropwhile(lambda token: [token] == self.bos, ids))

    def encode_document(self, place: str, document: Document, seq_len: int) -> list[int]:
        """At most `seq_len` ids, BOS first; token ids as they are; nothing for a document without a token."""
        if isinstance(document, list):
            return document[:seq_len]
        text = self.template.render(document.messages, place) if isinstance(document, Chat) else document
        ids = self.encode(text)
        return (self.bos + ids)[:seq_len] if ids else []

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the folder."""
        return open_tokenizer(self.folder)

    @cached_property
    def template(self) -> ChatTemplate:
        """Of the folder."""
        return open_chat_template(self.folder)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FxquantError(folder, "has no tokenizer.json.", "Put it there, or give token ids (.npy, .safetensors).")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise FxquantError(file, f"cannot be read: {error}.", "Copy the file again.") from None


def bos_ids(checkpoint: Checkpoint) -> list[int]:
    """[BOS] of the model, or nothing if it has none."""
    bos = checkpoint.config.get("bos_token_id")
    return [bos] if isinstance(bos, int) else []


def pad_id(checkpoint: Checkpoint) -> int:
    """The id to fill up with: the config's, or 0 where that is none of the vocabulary."""
    pad = checkpoint.config.get("pad_token_id")
    return pad if isinstance(pad, int) and 0 <= pad < checkpoint.config.get("vocab_size", 0) else 0


def _pieces(file: Path, encoder: Encoder, seq_len: int) -> Iterator[list[int]]:
    if file.suffix in (".json", ".jsonl"):
        documents = (encoder.encode_document(place, one, seq_len) for place, one in read_documents(file))
        yield from filter(None, documents)
    elif file.suffix == ".txt":
        ids, length = encoder.encode(_read(file)), seq_len - len(encoder.bos)
        yield from (encoder.bos + ids[start : start + length] for start in range(0, len(ids), length))
    else:
        raise FxquantError(file, f"a {file.suffix or 'file without suffix'}.", f"Give {FORMATS}.")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FxquantError(file, f"not UTF-8: {error}.", "Save it as UTF-8.") from None


def _token_ids(file: Path, checkpoint: Checkpoint) -> list[Tensor]:
    try:
        ids = torch.from_numpy(np.load(file, allow_pickle=False)) if file.suffix == ".npy" else token_ids_from(file)
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise FxquantError(file, f"cannot be read: {error}.", f"Give {FORMATS}.") from None
    if ids.dtype is not torch.int64 or ids.ndim != 2 or not ids.numel():
        raise FxquantError(file, f"{ids.dtype}{list(ids.shape)}.", "Token ids are int64 [batches, length].")
    _check_vocabulary(file, [ids], checkpoint)
    return list(ids.split(1))


def _check_vocabulary(file: Path, batches: list[Tensor], checkpoint: Checkpoint) -> None:
    size = checkpoint.config.get("vocab_size", 0)
    low, high = min(int(ids.min()) for ids in batches), max(int(ids.max()) for ids in batches)
    if low < 0 or high >= size:
        fact = f"token ids {low} … {high}, the vocabulary has {size}."
        raise FxquantError(file, fact, "Tokenize with this model's tokenizer.")
