"""Streamed text: all pieces together are the text of all tokens, up to the first stop word."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import EXAMPLE

from fxquant.generation.text_stream import TextStream
from fxquant.text.tokenizer import BoundedTokenizer, open_tokenizer

TEXT = "Größe 中文 🙂🙂 e\u0301 �"


def of_bytes(ids: Sequence[int]) -> str:
    """A token for each byte."""
    return bytes(ids).decode(errors="replace")


def of_pairs(ids: Sequence[int]) -> str:
    """A token for two bytes: characters end inside of tokens."""
    return b"".join(token.to_bytes(2, "big") for token in ids).decode(errors="replace")


def falling_back(ids: Sequence[int]) -> str:
    """As sentencepiece has bytes: of a run that is not valid as a whole each byte is no character."""
    try:
        return bytes(ids).decode()
    except UnicodeDecodeError:
        return "\N{REPLACEMENT CHARACTER}" * len(ids)


def pieces(stream: TextStream, ids: Sequence[int]) -> list[str]:
    out = []
    for token in ids:
        out.append(stream.feed(token))
        if stream.stop_word is not None:
            break
    return [*out, stream.end()]


@given(st.text())
def test_valid_text_is_whole(text: str) -> None:
    stream = TextStream(of_bytes)
    assert "".join(pieces(stream, text.encode())) == text == stream.text


@given(st.lists(st.integers(0, 255)))
def test_bytes_that_are_no_text_are_those_of_a_whole_decode(ids: list[int]) -> None:
    assert "".join(pieces(TextStream(of_bytes), ids)) == of_bytes(ids)


@given(st.lists(st.integers(0, 65535)))
def test_characters_that_end_inside_of_tokens(ids: list[int]) -> None:
    assert "".join(pieces(TextStream(of_pairs), ids)) == of_pairs(ids)


def test_a_character_of_four_tokens_comes_at_once() -> None:
    assert pieces(TextStream(of_bytes), "a🙂".encode()) == ["a", "", "", "", "🙂", ""]
    assert pieces(TextStream(falling_back), "a中b".encode()) == ["a", "", "", "中", "b", ""]


def test_half_a_character_at_the_end_is_given_out() -> None:
    assert pieces(TextStream(of_bytes), "a中".encode()[:-1]) == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_nothing_is_given_out_from_the_first_stop_word_on(text: str, stops: list[str]) -> None:
    stream = TextStream(of_bytes, stops)
    shown = "".join(pieces(stream, text.encode()))
    ends = [text.index(stop) for stop in stops if stop in text]
    # of two that overlap the one that is complete first counts: nothing later is generated
    complete = min((text.index(stop) + len(stop) for stop in stops if stop in text), default=None)
    if complete is None:
        assert shown == text and stream.stop_word is None
    else:
        first = [text[:complete].index(stop) for stop in stops if stop in text[:complete]]
        assert shown == text[: min(first)] and stream.stop_word in stops and min(ends) <= min(first)


def test_a_stop_word_inside_of_a_token_and_across_tokens() -> None:
    words = ["one", " two", "END three", " E", "ND"]
    decode = lambda ids: "".join(words[token] for token in ids)  # noqa: E731
    assert pieces(TextStream(decode, ["END"]), [0, 1, 2]) == ["one", " two", "", ""]
    stream = TextStream(decode, ["END"])
    assert pieces(stream, [0, 3, 4, 1]) == ["one", " ", "", ""] and stream.stop_word == "END"
    assert pieces(TextStream(decode, ["END"]), [0, 3, 1, 3]) == ["one", " ", "E two", " ", "E"]


def test_a_stop_token_has_no_text_and_ends_what_was_held() -> None:
    stream = TextStream(of_bytes, ["bcd"], {7: "<end>"})
    assert pieces(stream, [*b"ab", 7]) == ["a", "", "b", ""] and (stream.stop_word, stream.text) == ("<end>", "ab")


@pytest.fixture(scope="module")
def tokenizer() -> BoundedTokenizer:
    return open_tokenizer(EXAMPLE)


@pytest.mark.parametrize("text", [TEXT, TEXT * 20, "def main():\n    return  {}\n" * 30, "𝔘" * 50])
def test_the_examples_tokenizer(tokenizer: BoundedTokenizer, text: str) -> None:
    ids = [0, *tokenizer.encode(text), 1]
    assert "".join(pieces(TextStream(tokenizer.decode), ids)) == tokenizer.decode(ids)


def test_a_long_text_costs_no_more_a_token() -> None:
    asked: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        asked.append(len(ids))
        return of_bytes(ids)

    assert "".join(pieces(TextStream(decode), b"word " * 400)) == "word " * 400
    assert max(asked) <= 16 and len(asked) < 2 * 2000
