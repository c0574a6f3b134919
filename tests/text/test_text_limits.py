"""Texts, long, damaged or hostile: read in pieces as far as they are needed, or refused with their place."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_text import Words, jsonl, load, text_file, words

from fxquant.errors import FxquantError
from fxquant.generation.prompts import text_prompt
from fxquant.text import documents
from fxquant.text import load as text
from fxquant.text.load import bos_ids

__all__ = ["words"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.txt", b"a b \xed\xa0\x80 c"),
        ("text.json", rb'["a \ud800"]'),
        ("text.jsonl", rb'{"text": "a \udfff b"}'),
        ("text.jsonl", rb'{"messages": [{"role": "user", "content": "\ud800"}]}'),
    ],
)
def test_half_a_character_is_refused(name: str, content: bytes, words: Words, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FxquantError, match="lone surrogate|not valid UTF-8") as caught:
        load(tmp_path / name, words())
    assert caught.value.place.startswith(str(tmp_path / name))


def test_whole_characters_in_two_halves_are_text(words: Words, tmp_path: Path) -> None:
    assert load(jsonl(tmp_path, r'"a \ud83d\ude00"'), words()) == [[[1, 19]]]


def test_numbers_that_json_does_not_have_are_passed_over_beside_a_text(words: Words, tmp_path: Path) -> None:
    assert load(jsonl(tmp_path, '{"text": "a", "score": NaN}'), words()) == [[[1]]]


def test_long_lines_and_files_are_refused(words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "TEXT_BYTES", 12)
    checkpoint = words()
    with pytest.raises(FxquantError, match=r"text.jsonl:2: a line of more than 12 bytes"):
        load(jsonl(tmp_path, '"a b"', '"a b c d e f g"'), checkpoint)
    with pytest.raises(FxquantError, match=r"text.json: more than 12 bytes"):
        load(text_file(tmp_path, '["a b c d e f"]', "text.json"), checkpoint)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_a_text_in_pieces_is_the_text(
    piece: int, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at lines, or at words; a word of this tokenizer is a letter."""
    monkeypatch.setattr(text, "PIECE_CHARACTERS", piece)
    content, checkpoint = "a b c d\ne f g\n\nh i\r\nj", words(bos_token_id=0)
    expected = [[[0, 1, 2, 3, 4]], [[0, 5, 6, 7, 8]], [[0, 9, 10]]]
    assert load(text_file(tmp_path, content), checkpoint) == expected
    assert load(jsonl(tmp_path, json.dumps(content)), checkpoint, length=50) == [[[*range(11)]]]
    assert "".join(text.in_pieces([content, content])) == content * 2


def test_no_more_of_a_text_is_read_than_is_asked_for(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 8)
    (tmp_path / "text.txt").write_bytes(b"a b c d " * 10_000 + b"\xff")
    assert load(tmp_path / "text.txt", words(), samples=1, length=4) == [[[1, 2, 3, 4]]]


@pytest.mark.parametrize("bos", [-1, 20, 10**30])
def test_a_bos_that_is_no_token_is_refused(bos: int, words: Words, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"config.json: bos_token_id .* the vocabulary has 20"):
        load(text_file(tmp_path, "a"), words(bos_token_id=bos))


@pytest.mark.parametrize("bos", [True, "0", [0], {}, 0.0])
def test_a_bos_that_is_no_number_is_none(bos: Any, words: Words) -> None:
    assert bos_ids(words(bos_token_id=bos)) == []


def test_a_prompt_of_half_a_character() -> None:
    """As the command line has one that was no UTF-8."""
    with pytest.raises(FxquantError, match=r"--prompt: not valid text: '\\udcff' is half a character"):
        text_prompt("a \udcff")
