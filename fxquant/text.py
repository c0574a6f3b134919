"""Calibration and evaluation text: files to token ids."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fxquant.checkpoint import Checkpoint, token_ids_from
from fxquant.errors import FxquantError

FORMATS = ".txt, .jsonl with a text field, .npy or .safetensors of int64 [batches, length]"


def load_batches(file: Path, checkpoint: Checkpoint, samples: int, length: int) -> list[Tensor]:
    """Token ids int64 [1, ≤ length], at most `samples` of them.

    Text is tokenized and each piece starts with the model's BOS: a .txt is one running text cut into windows, a .jsonl
    one piece a document. Token ids are taken as they are, one row one batch, and never cut.
    """
    if not file.is_file():
        raise FxquantError(file, "no such file.", f"Give {FORMATS}.")
    if file.suffix in (".npy", ".safetensors"):
        return _token_ids(file, checkpoint)[:samples]
    tokenizer, bos = open_tokenizer(checkpoint.folder), bos_ids(checkpoint)
    if length <= len(bos):
        raise FxquantError(file, f"length {length} leaves no room for text.", "Take at least 2 tokens a batch.")
    pieces = _pieces(file, tokenizer, length - len(bos))
    batches = [torch.tensor([bos + ids]) for _, ids in zip(range(samples), pieces, strict=False)]
    if not batches:
        raise FxquantError(file, "holds no text.", f"Give {FORMATS}.")
    _check_vocabulary(file, batches, checkpoint)
    return batches


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


def _pieces(file: Path, tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    if file.suffix == ".jsonl":
        for text in _documents(file):
            ids = tokenizer.encode(text, add_special_tokens=False).ids[:length]
            if ids:
                yield ids
    elif file.suffix == ".txt":
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FxquantError(file, f"not UTF-8: {error}.", "Save it as UTF-8.") from None
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        yield from (ids[start : start + length] for start in range(0, len(ids), length))
    else:
        raise FxquantError(file, f"a {file.suffix or 'file without suffix'}.", f"Give {FORMATS}.")


def _documents(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8"))["text"]
            except UnicodeDecodeError as error:
                raise FxquantError(f"{file}:{number}", f"not UTF-8: {error}.", "Save it as UTF-8.") from None
            except (json.JSONDecodeError, KeyError, TypeError):
                raise FxquantError(f"{file}:{number}", "is not an object with a text field.", "One per line.") from None
            if not isinstance(text, str):
                raise FxquantError(f"{file}:{number}", "text is not a string.", "One document per line.")
            yield text


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
