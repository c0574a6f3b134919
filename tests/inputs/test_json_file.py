"""JSON from outside: what is read is what Python's json reads, and what is refused has one kind of error."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant.errors import FxquantError
from fxquant.inputs.json_file import parse_json, read_json, read_text
from fxquant.inputs.limits import NESTING, NUMBER_DIGITS

NUMBERS = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
WRONG = {
    "cut off": b'{"a": ',
    "not UTF-8": b'"\xff"',
    "nested": b"[" * (NESTING + 1) + b"]" * (NESTING + 1),
    "nested past every parser": b"[" * 200_000,
    "a key twice": b'{"a": 1, "b": 2, "a": 1}',
    "a long number": b"[" + b"1" * (NUMBER_DIGITS + 1) + b"]",
    "a number that no int takes": b"1" * 5000,
    "a long fraction": b"1." + b"1" * NUMBER_DIGITS,
    "NaN": b"[NaN]",
    "-Infinity": b"[-Infinity]",
    "a lone surrogate": b'["\\ud800"]',
    "a lone surrogate as a key": b'{"\\uDFFF": 1}',
    "nothing": b"",
}


@given(VALUES)
def test_reads_what_python_writes(value):
    assert parse_json(json.dumps(value), "here") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "here") == value


@pytest.mark.parametrize("name", WRONG)
def test_refuses_by_name(name, tmp_path):
    path = tmp_path / "document.json"
    path.write_bytes(WRONG[name])
    with pytest.raises(FxquantError) as caught:
        read_json(path, 1 << 20, "Do this.")
    assert caught.value.place == str(path)
    assert caught.value.remedy == "Do this."
    caught.value.fact.encode("utf-8")


def test_nesting_up_to_the_limit_is_read():
    text = "[" * NESTING + "]" * NESTING
    assert json.dumps(parse_json(text, "here")) == text


def test_a_surrogate_pair_is_a_character():
    assert parse_json(b'"\\ud83d\\ude00"', "here") == "\U0001f600"


def test_lenient_reads_constants_and_keys_twice():
    assert parse_json('{"a": 1, "a": Infinity}', "here", lenient=True) == {"a": float("inf")}


def test_bytes_are_bounded(tmp_path):
    path = tmp_path / "document.json"
    path.write_text("[1]")
    assert read_json(path, 3) == [1]
    with pytest.raises(FxquantError, match="more than 2 bytes"):
        read_json(path, 2)


def test_what_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    folder = "not a regular file"
    facts = {".": folder, "absent": "is missing", "pipe": folder, "x" * 300: "cannot be read"}
    for name, fact in facts.items():
        with pytest.raises(FxquantError, match=fact):
            read_text(tmp_path / name, 10)
    with pytest.raises(FxquantError, match="is missing|cannot be read"):
        read_text(tmp_path / "a\0b", 10)


def test_a_byte_order_mark_is_read_where_others_wrote_the_file():
    assert parse_json(b"\xef\xbb\xbf[1]", "here", lenient=True) == [1]
    with pytest.raises(FxquantError, match="not JSON"):
        parse_json(b"\xef\xbb\xbf[1]", "here")
