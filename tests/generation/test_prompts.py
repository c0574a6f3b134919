"""Prompts: files of them, and stdin."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import FxquantError
from fxquant.generation.prompts import Prompt, read_prompts, stdin_prompt
from fxquant.text.documents import Chat

CHAT = [{"role": "user", "content": "a"}]


def written(folder: Path, name: str, text: str | bytes) -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def test_a_text_file_has_a_prompt_per_line(tmp_path: Path) -> None:
    file = written(tmp_path, "p.txt", "one \n\n  \nGröße\nlast")
    assert read_prompts(file) == [
        Prompt(f"{file}:1", "one "),
        Prompt(f"{file}:4", "Größe"),
        Prompt(f"{file}:5", "last"),
    ]


def test_documents_are_texts_chats_or_ids(tmp_path: Path) -> None:
    documents: list[Any] = ["a\nb", {"text": "c"}, {"messages": CHAT}, CHAT, [1, 2]]
    expected = ["a\nb", "c", Chat(CHAT), Chat(CHAT), [1, 2]]
    lines = written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, documents)))
    whole = written(tmp_path, "p.json", json.dumps(documents))
    for file in (lines, whole):
        assert [prompt.document for prompt in read_prompts(file)] == expected
    assert read_prompts(lines)[1].place == f"{lines}:2" and read_prompts(whole)[1].place == f"{whole}[1]"


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("p.txt", "", "holds no prompt"),
        ("p.jsonl", "\n", "holds no prompt"),
        ("p.txt", b"\xff", "not valid UTF-8"),
        ("p.npy", "", "unsupported suffix .npy"),
        ("p.jsonl", "{", "p.jsonl:1"),
    ],
)
def test_files_that_are_refused(name: str, text: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=words):
        read_prompts(written(tmp_path, name, text))


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.generation.prompts.TEXT_BYTES", 8)
    with pytest.raises(FxquantError, match="p.txt:2: a line of 8 characters or more"):
        read_prompts(written(tmp_path, "p.txt", "abc\nabcdefgh\n"))


def test_a_folder_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="not a regular file"):
        read_prompts(tmp_path)
    with pytest.raises(FxquantError, match="no such file"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("data, text", [(b"a\nb\n", "a\nb"), (b"a\r\n", "a"), (b"a\n\n", "a\n"), (b"", "")])
def test_stdin_without_its_last_newline(data: bytes, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert stdin_prompt() == Prompt("stdin", text)


def test_stdin_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(FxquantError, match="stdin: not valid UTF-8"):
        stdin_prompt()
