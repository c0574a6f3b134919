"""Text loading: calibration and evaluation files to token ids."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, dropwhile, islice
from pathlib import Path

import torch
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.inputs.limits import PIECE_CHARACTERS
from fxquant.text.chat_template import ChatTemplate, open_chat_template
from fxquant.text.documents import Chat, Document, read_documents
from fxquant.text.token_ids import check_vocabulary, read_token_ids
from fxquant.text.tokenizer import BoundedTokenizer, open_tokenizer

FORMATS = ".txt, .json or .jsonl of texts, chats or token ids, .npy or .safetensors of int64 [batches, length]"


def load_batches(file: Path, checkpoint: Checkpoint, samples: int, seq_len: int) -> list[Tensor]:
    """At most `samples` batches of token ids, int64 [1, ≤ seq_len].

    Text is tokenized, and each piece starts with one BOS of the model: a .txt file is one text cut into windows, a
    .json or .jsonl file has one piece per document; chats use the tokenizer's chat template. Token ids are not changed;
    rows of .npy and .safetensors files, one per batch, are never cut. Only the needed part of a text is read.
    """
    try:
        return _load(file, checkpoint, samples, seq_len)
    except UnicodeDecodeError as error:
        raise FxquantError(file, f"not valid UTF-8: {error}.", "Save it as UTF-8.") from None
    except OSError as error:
        raise FxquantError(file, f"cannot be read: {error.strerror}.", f"Pass {FORMATS}.") from None


def _load(file: Path, checkpoint: Checkpoint, samples: int, seq_len: int) -> list[Tensor]:
    if not file.is_file():
        fact = "not a regular file." if file.exists() else "no such file."
        raise FxquantError(file, fact, f"Pass {FORMATS}.")
    if file.suffix in (".npy", ".safetensors"):
        return list(read_token_ids(file, checkpoint)[:samples].split(1))
    encoder = Encoder(checkpoint.folder, bos_ids(checkpoint))
    if seq_len <= len(encoder.bos):
        raise FxquantError(file, f"length {seq_len} leaves no room for text.", "Use at least 2 tokens per batch.")
    batches = [torch.tensor([ids]) for ids in islice(_pieces(file, encoder, seq_len), samples)]
    if not batches:
        raise FxquantError(file, "holds no text.", f"Pass {FORMATS}.")
    check_vocabulary(file, batches, checkpoint)
    return batches


@dataclass(frozen=True)
class Encoder:
    """Documents to token ids, by the tokenizer and chat template of `folder`, which are loaded on first use.

    bos  prefix of every text: [BOS], or empty
    """

    folder: Path
    bos: list[int]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without a leading BOS, which chat templates write themselves."""
        return list(self.without_bos(self.tokenizer.encode(text)))

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[int]:
        """Ids of a text in pieces, without a leading BOS; each piece is tokenized when it is needed."""
        return self.without_bos(chain.from_iterable(self.tokenizer.encode(piece) for piece in pieces))

    def without_bos(self, ids: Iterable[int]) -> Iterator[int]:
        """`ids` without leading BOS."""
        return dropwhile(lambda token: [token] == self.bos, ids)

    def encode_document(self, place: str, document: Document, seq_len: int) -> list[int]:
        """At most `seq_len` ids, BOS first; token ids unchanged; empty for a document without tokens."""
        if isinstance(document, list):
            return document[:seq_len]
        text = self.template.render(document.messages, place) if isinstance(document, Chat) else document
        ids = list(islice(self.encode_pieces(in_pieces([text])), seq_len))
        return (self.bos + ids)[:seq_len] if ids else []

    @cached_property
    def tokenizer(self) -> BoundedTokenizer:
        """The folder's tokenizer."""
        return open_tokenizer(self.folder)

    @cached_property
    def template(self) -> ChatTemplate:
        """The folder's chat template."""
        return open_chat_template(self.folder)


def bos_ids(checkpoint: Checkpoint) -> list[int]:
    """[BOS] of the model, or empty if it has none. Raises FxquantError if BOS is outside the vocabulary."""
    bos, size = checkpoint.config.get("bos_token_id"), checkpoint.config.get("vocab_size", 0)
    if type(bos) is not int:
        return []
    if not 0 <= bos < size:
        fact = f"bos_token_id is {str(bos)[:40]}, but the vocabulary has {size} tokens."
        raise FxquantError(checkpoint.folder / "config.json", fact, "Correct it, or set it to null.")
    return [bos]


def pad_id(checkpoint: Checkpoint) -> int:
    """The padding id: the config's, or 0 if that is outside the vocabulary."""
    pad = checkpoint.config.get("pad_token_id")
    return pad if isinstance(pad, int) and 0 <= pad < checkpoint.config.get("vocab_size", 0) else 0


def _pieces(file: Path, encoder: Encoder, seq_len: int) -> Iterator[list[int]]:
    if file.suffix in (".json", ".jsonl"):
        documents = (encoder.encode_document(place, document, seq_len) for place, document in read_documents(file))
        yield from filter(None, documents)
    elif file.suffix == ".txt":
        ids, length = encoder.encode_pieces(in_pieces(_read(file))), seq_len - len(encoder.bos)
        while window := list(islice(ids, length)):
            yield encoder.bos + window
    else:
        raise FxquantError(file, f"unsupported suffix {file.suffix or '(none)'}.", f"Pass {FORMATS}.")


def _read(file: Path) -> Iterator[str]:
    """The text of `file`, in parts."""
    with file.open(encoding="utf-8") as text:
        while part := text.read(PIECE_CHARACTERS):
            yield part


def in_pieces(parts: Iterable[str]) -> Iterator[str]:
    """A text, given in parts, as pieces of at most `PIECE_CHARACTERS`, so that a tokenizer's memory stays bounded. Cuts
    are after the last line of a piece, else its last word."""
    rest = ""
    for part in parts:
        rest += part
        while len(rest) > PIECE_CHARACTERS:
            piece = rest[:PIECE_CHARACTERS]
            cut = piece.rfind("\n") + 1 or max(piece.rfind(" "), 0) or PIECE_CHARACTERS
            yield piece[:cut]
            rest = rest[cut:]
    if rest:
        yield rest
