"""Files of text and of token ids to batches; what is wrong with a file is said with its place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.text.load import bos_ids, load_batches
from fxquant.text.tokenizer import open_tokenizer

Words = Callable[..., Checkpoint]
LETTERS = "abcdefghijklmnop"
VOCABULARY = 20


@pytest.fixture
def words(tmp_path: Path) -> Words:
    """`words(bos_token_id=0)`: a model whose tokenizer makes a → 1, b → 2, …, and anything else → 19."""

    def model(**config: Any) -> Checkpoint:
        folder = tmp_path / "model"
        folder.mkdir()
        vocabulary = {letter: index for index, letter in enumerate(LETTERS, 1)} | {"<bos>": 0, "<unk>": 19}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))
        return Checkpoint(folder, {"vocab_size": VOCABULARY, **config}, {})

    return model


def load(file: Path, checkpoint: Checkpoint, samples: int = 100, length: int = 5) -> list[list[list[int]]]:
    batches = load_batches(file, checkpoint, samples, length)
    assert all(batch.dtype is torch.int64 for batch in batches)
    return [batch.tolist() for batch in batches]


def text_file(tmp_path: Path, text: str, name: str = "text.txt") -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def jsonl(tmp_path: Path, *lines: str) -> Path:
    return text_file(tmp_path, "\n".join(lines) + "\n", "text.jsonl")


# running text


def test_a_text_is_cut_into_windows_that_start_with_bos(words: Words, tmp_path: Path) -> None:
    file = text_file(tmp_path, "a b c d\ne f g\n\nh i")
    assert load(file, words(bos_token_id=0)) == [[[0, 1, 2, 3, 4]], [[0, 5, 6, 7, 8]], [[0, 9]]]


@pytest.mark.parametrize("config", [{}, {"bos_token_id": None}])
def test_a_model_without_bos_gets_none(config: dict[str, Any], words: Words, tmp_path: Path) -> None:
    assert load(text_file(tmp_path, "a b c d e f g"), words(**config)) == [[[1, 2, 3, 4, 5]], [[6, 7]]]


def test_no_more_windows_than_samples(words: Words, tmp_path: Path) -> None:
    assert load(text_file(tmp_path, "a b c d e f g"), words(), samples=1, length=3) == [[[1, 2, 3]]]


@pytest.mark.parametrize(("bos", "expected"), [(0, [0]), (7, [7]), (None, [])])
def test_bos_ids(bos: int | None, expected: list[int], words: Words) -> None:
    assert bos_ids(words(bos_token_id=bos)) == expected


# documents


def test_a_jsonl_is_one_batch_a_document(words: Words, tmp_path: Path) -> None:
    file = jsonl(tmp_path, '{"text": "a b"}', "", '{"text": "c d e f g h", "source": "x"}', '{"text": "i"}')
    assert load(file, words(bos_token_id=0)) == [[[0, 1, 2]], [[0, 3, 4, 5, 6]], [[0, 9]]]


def test_empty_documents_are_passed_over(words: Words, tmp_path: Path) -> None:
    lines = ('{"text": ""}', '{"text": "a"}', '{"text": "  "}')
    assert load(jsonl(tmp_path, *lines), words(bos_token_id=0)) == [[[0, 1]]]


def test_no_more_documents_than_samples_are_read(words: Words, tmp_path: Path) -> None:
    assert load(jsonl(tmp_path, '"a"', '"b"', "not json"), words(), samples=2) == [[[1]], [[2]]]


def test_a_json_is_a_list_of_documents(words: Words, tmp_path: Path) -> None:
    file = text_file(tmp_path, '["a b", "", {"text": "c d e f g h"}, [7, 8], []]', "text.json")
    assert load(file, words(bos_token_id=0)) == [[[0, 1, 2]], [[0, 3, 4, 5, 6]], [[7, 8]]]
    assert load(file, Checkpoint(tmp_path / "model", {"vocab_size": VOCABULARY}, {}), samples=1) == [[[1, 2]]]


def test_a_line_is_a_string_an_object_or_token_ids(words: Words, tmp_path: Path) -> None:
    """Ids are taken as they are, without BOS, and cut; no tokenizer is needed for them alone."""
    lines = ('"a b"', '{"text": "c"}', "[9, 8, 7, 6, 5, 4, 3]")
    checkpoint = words(bos_token_id=0)
    assert load(jsonl(tmp_path, *lines), checkpoint) == [[[0, 1, 2]], [[0, 3]], [[9, 8, 7, 6, 5]]]
    (checkpoint.folder / "tokenizer.json").unlink()
    assert load(jsonl(tmp_path, lines[2]), checkpoint, length=2) == [[[9, 8]]]


# token ids


def save_ids(file: Path, ids: np.ndarray) -> Path:
    np.save(file, ids) if file.suffix == ".npy" else save_file({"ids": torch.from_numpy(ids)}, file)
    return file


both_formats = pytest.mark.parametrize("name", ["ids.npy", "ids.safetensors"])


@both_formats
def test_token_ids_are_taken_as_they_are(name: str, words: Words, tmp_path: Path) -> None:
    """Never cut, no BOS, and no tokenizer needed."""
    checkpoint, file = words(bos_token_id=0), save_ids(tmp_path / name, np.arange(18).reshape(3, 6) + 2)
    (checkpoint.folder / "tokenizer.json").unlink()
    rows = [[list(range(start, start + 6))] for start in (2, 8, 14)]
    assert load(file, checkpoint, length=3) == rows
    assert load(file, checkpoint, samples=2, length=3) == rows[:2]


@both_formats
@pytest.mark.parametrize(
    ("ids", "fact"),
    [
        (np.zeros((2, 3), np.int32), "torch.int32[2, 3]"),
        (np.zeros((2, 3), np.float32), "torch.float32[2, 3]"),
        (np.zeros(3, np.int64), "torch.int64[3]"),
        (np.zeros((1, 2, 3), np.int64), "torch.int64[1, 2, 3]"),
        (np.zeros((0, 3), np.int64), "torch.int64[0, 3]"),
        (np.zeros((2, 0), np.int64), "torch.int64[2, 0]"),
        (np.array([[0, 20]]), "token ids 0 … 20, but the vocabulary has 20"),
        (np.array([[-1, 3]]), "token ids -1 … 3, but the vocabulary has 20"),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")) + str(getattr(value, "shape", "")),
)
def test_bad_token_ids_are_refused_with_the_facts(
    ids: np.ndarray, fact: str, name: str, words: Words, tmp_path: Path
) -> None:
    with pytest.raises(FxquantError) as caught:
        load(save_ids(tmp_path / name, ids), words())
    assert caught.value.place == str(tmp_path / name) and fact in caught.value.fact and caught.value.remedy


def test_the_largest_token_id_is_the_vocabulary_less_one(words: Words, tmp_path: Path) -> None:
    assert load(save_ids(tmp_path / "ids.npy", np.array([[0, 19]])), words()) == [[[0, 19]]]


def test_two_tensors_in_one_file_are_refused(words: Words, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1, 1, dtype=torch.int64), "b": torch.zeros(1)}, tmp_path / "ids.safetensors")
    with pytest.raises(FxquantError, match="holds 2 tensors"):
        load(tmp_path / "ids.safetensors", words())


def pickled(file: Path) -> None:
    np.save(file, np.array([[object()]]), allow_pickle=True)


def words_array(file: Path) -> None:
    np.save(file, np.array([["a", "b"]]))


def archive(file: Path) -> None:
    with file.open("wb") as stream:
        np.savez(stream, ids=np.zeros((1, 2), np.int64))


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\x93NUMPY\x01\x00"),
        lambda file: file.write_bytes(b"0 1 2"),
        pickled,
        words_array,
        archive,
        lambda file: np.save(file, np.zeros((1, 2), ">i8")),
    ],
    ids=["empty", "cut", "text", "pickled", "strings", "archive", "big endian"],
)
def test_an_unreadable_npy_is_refused(write: Callable[[Path], Any], words: Words, tmp_path: Path) -> None:
    write(tmp_path / "ids.npy")
    with pytest.raises(FxquantError) as caught:
        load(tmp_path / "ids.npy", words())
    assert caught.value.place == str(tmp_path / "ids.npy")


@pytest.mark.parametrize("content", [b"", b"0 1 2", b"\x08" + bytes(7) + b"not json"])
def test_an_unreadable_safetensors_is_refused(content: bytes, words: Words, tmp_path: Path) -> None:
    (tmp_path / "ids.safetensors").write_bytes(content)
    with pytest.raises(FxquantError) as caught:
        load(tmp_path / "ids.safetensors", words())
    assert caught.value.place == str(tmp_path / "ids.safetensors")


# the file itself


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl", "absent.npy", "absent.safetensors", "model"])
def test_a_file_that_is_none_is_refused(name: str, words: Words, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="not a regular file" if name == "model" else "no such file") as caught:
        load(tmp_path / name, words())
    assert ".jsonl" in caught.value.remedy and ".npy" in caught.value.remedy


@pytest.mark.parametrize(("name", "fact"), [("text.csv", "unsupported suffix .csv"), ("text", r"suffix \(none\)")])
def test_an_unknown_suffix_is_refused_with_the_known_ones(name: str, fact: str, words: Words, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=fact) as caught:
        load(text_file(tmp_path, "a b", name), words())
    assert all(suffix in caught.value.remedy for suffix in (".txt", ".jsonl", ".npy", ".safetensors"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("text.txt", text) for text in ("", " \n ")),
        *(("text.jsonl", text) for text in ("\n\n", '{"text": ""}', '{"messages": []}', "[]")),
        *(("text.json", text) for text in ("[]", '["", []]')),
    ],
)
def test_a_file_without_text_is_refused(name: str, text: str, words: Words, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="holds no text"):
        load(text_file(tmp_path, text, name), words(bos_token_id=0))


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.json"])
def test_text_that_is_not_utf8_is_refused(name: str, words: Words, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(json.dumps({"text": "a é"}, ensure_ascii=False).encode("latin-1") + b"\n")
    with pytest.raises(FxquantError, match="not valid UTF-8") as caught:
        load(tmp_path / name, words())
    assert caught.value.place.startswith(str(tmp_path / name))


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_length_that_bos_alone_fills_is_refused(name: str, words: Words, tmp_path: Path) -> None:
    text_file(tmp_path, '{"text": "a b c"}', name)
    with pytest.raises(FxquantError, match="length 1"):
        load(tmp_path / name, words(bos_token_id=0), length=1)


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_tokenizer_of_another_model_is_refused(name: str, words: Words, tmp_path: Path) -> None:
    """Its ids lie beyond the embedding."""
    text_file(tmp_path, '{"text": "a z"}', name)
    with pytest.raises(FxquantError, match="19, but the vocabulary has 19"):
        load(tmp_path / name, words(vocab_size=19))


@pytest.mark.parametrize("line", ["[1, 20]", "[-1]"])
def test_ids_of_documents_lie_in_the_vocabulary(line: str, words: Words, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="the vocabulary has 20"):
        load(jsonl(tmp_path, line), words())


def test_a_model_without_tokenizer_is_refused(words: Words, tmp_path: Path) -> None:
    checkpoint = words()
    (checkpoint.folder / "tokenizer.json").unlink()
    with pytest.raises(FxquantError, match="has no tokenizer.json") as caught:
        load(text_file(tmp_path, "a b"), checkpoint)
    assert caught.value.place == str(checkpoint.folder)


def test_a_broken_tokenizer_is_refused(words: Words) -> None:
    file = words().folder / "tokenizer.json"
    file.write_text('{"version": "1.0"')
    with pytest.raises(FxquantError, match="cannot be read") as caught:
        open_tokenizer(file.parent)
    assert caught.value.place == str(file)


def test_special_tokens_are_not_added_twice(words: Words, tmp_path: Path) -> None:
    """A tokenizer with a template would put a second BOS in front of every document."""
    checkpoint = words(bos_token_id=0)
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.save(str(checkpoint.folder / "tokenizer.json"))
    assert load(text_file(tmp_path, "a b"), checkpoint) == [[[0, 1, 2]]]
    assert load(jsonl(tmp_path, '{"text": "a b"}'), checkpoint) == [[[0, 1, 2]]]


def test_a_bos_that_the_text_has_is_not_repeated(words: Words, tmp_path: Path) -> None:
    checkpoint = words(bos_token_id=0)
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.save(str(checkpoint.folder / "tokenizer.json"))
    assert load(text_file(tmp_path, "<bos>a b"), checkpoint) == [[[0, 1, 2]]]
    assert load(jsonl(tmp_path, '"<bos><bos>a <bos>"', '"<bos>"'), checkpoint) == [[[0, 1, 0]]]
