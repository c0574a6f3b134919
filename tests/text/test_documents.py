"""Documents of .json and .jsonl files, and what is wrong with one, by its place."""

from pathlib import Path

import pytest

from fxquant.errors import FxquantError
from fxquant.text.documents import Chat, Document, read_documents

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": []}]


def read(tmp_path: Path, text: str, name: str) -> list[tuple[str, Document]]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return [(place.removeprefix(str(tmp_path)), document) for place, document in read_documents(tmp_path / name)]


def test_every_line_that_is_not_empty_is_one(tmp_path: Path) -> None:
    chat = str(CHAT).replace("'", '"').replace("None", "null")
    lines = (
        '"a"',
        "",
        '{"text": "b", "id": 3}',
        chat,
        f'{{"messages": {chat}}}',
        "[3, 0]",
        '""',
        "[]",
        '{"messages": []}',
    )
    assert read(tmp_path, "\n".join(lines), "d.jsonl") == [
        ("/d.jsonl:1", "a"),
        ("/d.jsonl:3", "b"),
        ("/d.jsonl:4", Chat(CHAT)),
        ("/d.jsonl:5", Chat(CHAT)),
        ("/d.jsonl:6", [3, 0]),
    ]


def test_every_entry_of_a_json_is_one(tmp_path: Path) -> None:
    assert read(tmp_path, '["a", [1], {"text": "b"}]', "d.json") == [
        ("/d.json[0]", "a"),
        ("/d.json[1]", [1]),
        ("/d.json[2]", "b"),
    ]


FAULTS = {
    "not json": "not JSON",
    '{"text": "a"': "not JSON",
    "[" * 100_000: "nested more than",
    '{"content": "a"}': "an object without text or messages",
    '{"role": "user", "content": "a"}': "an object without text or messages",
    '{"text": "a", "messages": []}': "both text and messages",
    '{"text": 3}': "text is not a string",
    '{"text": null}': "text is not a string",
    '{"messages": "a"}': "messages are not a list",
    '{"messages": ["a"]}': "a message without role or content",
    '{"messages": [1]}': "a message without role or content",
    '{"messages": [{"role": "user"}]}': "a message without role or content",
    '{"messages": [{"role": 1, "content": "a"}]}': "a message without role or content",
    '["a"]': "holds a list of something else",
    "[1, true]": "holds a list of something else",
    '[1, {"role": "user", "content": "a"}]': "holds a list of something else",
    "[9223372036854775808]": "holds a list of something else",
    "3": "holds a number",
    "true": "holds a boolean",
    "null": "holds null",
}


@pytest.mark.parametrize(("line", "fact"), FAULTS.items(), ids=[line[:40] for line in FAULTS])
def test_a_bad_line_is_named_by_number(line: str, fact: str, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=fact) as caught:
        read(tmp_path, f'{{"text": "a"}}\n\n{line}\n', "d.jsonl")
    assert caught.value.place == f"{tmp_path / 'd.jsonl'}:3" and "messages" in caught.value.remedy


def test_a_bad_entry_is_named_by_its_index(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="without text or messages") as caught:
        read(tmp_path, '["a", {"content": "b"}]', "d.json")
    assert caught.value.place == f"{tmp_path / 'd.json'}[1]"


@pytest.mark.parametrize("text", ['{"text": "a"}', '"a"', "3"])
def test_a_json_that_is_no_list_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="not a list of documents"):
        read(tmp_path, text, "d.json")
