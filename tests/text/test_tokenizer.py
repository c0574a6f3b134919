"""Tokenizers are foreign code: damaged and hostile ones end in an error of one line, in bounded time and memory."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import EXAMPLE

from fxquant.errors import FxquantError
from fxquant.text import tokenizer as module
from fxquant.text.tokenizer import BoundedTokenizer, open_tokenizer

Change = Callable[[dict[str, Any]], Any]


def folder_with(path: Path, change: Change) -> Path:
    """The example's tokenizer, changed."""
    document = json.loads((EXAMPLE / "tokenizer.json").read_text(encoding="utf-8"))
    change(document)
    (path / "tokenizer.json").write_text(json.dumps(document))
    return path


def replaced(key: str, value: Any) -> Change:
    return lambda document: document.__setitem__(key, value)


def of_model(key: str, value: Any) -> Change:
    return lambda document: document["model"].__setitem__(key, value)


def padding(**changes: Any) -> Change:
    whole = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    return replaced("padding", whole | {"pad_type_id": 0, "pad_token": "x"} | changes)


def truncation(length: int, stride: int = 0) -> Change:
    return replaced(
        "truncation", {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": stride}
    )


@pytest.fixture(scope="module")
def plain() -> list[int]:
    return open_tokenizer(EXAMPLE).encode("hello world 123 " * 10)


@pytest.mark.parametrize(
    "change",
    [
        padding(strategy={"Fixed": 10**9}),
        padding(pad_to_multiple_of=10**9),
        truncation(3),
        truncation(3, stride=3),
        of_model("dropout", 0.5),
    ],
    ids=["padding", "multiple", "truncation", "stride", "dropout"],
)
def test_what_changes_lengths_or_is_drawn_by_chance_is_off(change: Change, tmp_path: Path, plain: list[int]) -> None:
    assert open_tokenizer(folder_with(tmp_path, change)).encode("hello world 123 " * 10) == plain


UNREADABLE: dict[str, Change | str] = {
    "empty": "",
    "null": "null",
    "no model": "{}",
    "not UTF-8": "\udcff",
    "deep": '{"normalizer":' + '{"type":"Sequence","normalizers":[' * 100_000,
    "a merge of no token": of_model("merges", [["zzzz", "qqq"]]),
    "an id beyond 32 bits": of_model("vocab", {"a": 10**30}),
    "panic: chunks of nothing": replaced("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    "panic: prefix": of_model("continuing_subword_prefix", "abcdefghijklmnopqr"),
    "panic: character map": replaced("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "abort: character map": replaced("normalizer", {"type": "Precompiled", "precompiled_charsmap": "//////8="}),
}


@pytest.mark.parametrize("change", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_tokenizer_is_named(change: Change | str, tmp_path: Path, capfd: Any) -> None:
    """Wherever the library panics: nothing of that is on the screen."""
    if isinstance(change, str):
        (tmp_path / "tokenizer.json").write_bytes(change.encode(errors="surrogateescape"))
    else:
        folder_with(tmp_path, change)
    with pytest.raises(FxquantError) as caught:
        open_tokenizer(tmp_path).encode("hello world 123")
    assert caught.value.place == str(tmp_path / "tokenizer.json") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert capfd.readouterr() == ("", "")


def grown(times: int) -> list[dict[str, Any]]:
    step = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 300}
    return [step] * times


@pytest.mark.parametrize(
    "change",
    [
        replaced("normalizer", {"type": "Sequence", "normalizers": grown(4)}),
        replaced("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(e+e+)+b"}, "behavior": "Isolated",
                                   "invert": False}),
    ],
    ids=["a text that grows", "a regex that backtracks"],
)  # fmt: skip
def test_a_text_that_blows_up_ends(change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENIZER_MEMORY", 512 << 20)
    tokenizer = open_tokenizer(folder_with(tmp_path, change))
    monkeypatch.setattr(module, "TEXT_SECONDS", 2)
    with pytest.raises(FxquantError, match="the tokenizer fails on a text: "):
        tokenizer.encode("e" * 100)
    assert tokenizer.encode("a b") == tokenizer.encode("a b"), "a new process answers the next"


def test_decoding_that_blows_up_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENIZER_MEMORY", 512 << 20)
    change = replaced("decoder", {"type": "Sequence", "decoders": grown(4)})
    tokenizer = open_tokenizer(folder_with(tmp_path, change))
    monkeypatch.setattr(module, "TEXT_SECONDS", 2)
    ids = tokenizer.encode("e e e e")
    with pytest.raises(FxquantError, match="the tokenizer fails on token ids: "):
        tokenizer.decode(ids)


def test_ids_of_no_token_and_halves_of_characters(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(EXAMPLE)
    assert tokenizer.decode([10**6]) == ""
    with pytest.raises(FxquantError, match=r"the text contains a lone surrogate, '\\ud800'"):
        tokenizer.encode("a\ud800")
    with pytest.raises(FxquantError, match="the tokenizer fails on token ids"):
        tokenizer.decode([-1])
    assert tokenizer.decode(tokenizer.encode("hällo 你好")) == "hällo 你好"


def test_a_large_file_and_one_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENIZER_BYTES", 100)
    with pytest.raises(FxquantError, match="bytes, at most 100 are read"):
        open_tokenizer(EXAMPLE)
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(FxquantError, match="has no tokenizer.json"):
        open_tokenizer(tmp_path)


def test_the_process_ends_with_its_tokenizer() -> None:
    tokenizer = BoundedTokenizer(EXAMPLE / "tokenizer.json")
    process = tokenizer._worker._process
    assert process is not None and process.poll() is None
    del tokenizer
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < 10:
        time.sleep(0.01)
    assert process.poll() is not None


def test_forked_processes_ask_each_their_own(plain: list[int]) -> None:
    """Two that share a pipe would take each other's answers."""
    tokenizer = open_tokenizer(EXAMPLE)
    children = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            text = "hello " * (number + 1)
            answers = {tuple(tokenizer.encode(text)) for _ in range(500)}
            os._exit(0 if len(answers) == 1 and tokenizer.decode(answers.pop()) == text else 1)
        children.append(pid)
    assert tokenizer.encode("hello world 123 " * 10) == plain
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
