"""Documents in .json and .jsonl files for calibration and evaluation: texts, chats and token ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import FxquantError
from fxquant.inputs.json_file import parse_json, read_json
from fxquant.inputs.limits import TEXT_BYTES
from fxquant.text.chat_template import Message

KINDS = "a string, an object with text or messages, a list of messages, or a list of token ids"

REMEDY = f"Save documents as UTF-8; each is {KINDS}."


@dataclass(frozen=True)
class Chat:
    """A list of messages, each with role and content."""

    messages: list[Message]


Document = str | Chat | list[int]


def read_documents(file: Path) -> Iterator[tuple[str, Document]]:
    """Each non-empty document with its place; a .jsonl file is read lazily, line by line."""
    for place, value in _lines(file) if file.suffix == ".jsonl" else _entries(file):
        document = _document(place, value)
        if document:
            yield place, document


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(TEXT_BYTES + 1):
            number += 1
            place = f"{file}:{number}"
            if len(line) > TEXT_BYTES:
                fact = f"a line of more than {TEXT_BYTES:,} bytes."
                raise FxquantError(place, fact, "A .jsonl file has one document per line.")
            if line.strip():
                yield place, parse_json(line, place, REMEDY, lenient=True)


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    entries = read_json(file, TEXT_BYTES, REMEDY, lenient=True)
    if not isinstance(entries, list):
        raise FxquantError(file, "not a list of documents.", f"Use a list; a document is {KINDS}.")
    yield from ((f"{file}[{index}]", entry) for index, entry in enumerate(entries))


def _document(place: str, value: Any) -> Document:
    if isinstance(value, dict):
        return _of_object(place, value)
    if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)):
        return value
    if isinstance(value, list) and _are_messages(value):
        return Chat(value)
    raise FxquantError(place, f"holds {_name(value)}.", f"A document is {KINDS}.")


def _of_object(place: str, value: dict[str, Any]) -> Document:
    text, messages = value.get("text"), value.get("messages")
    facts = {
        "is an object without text or messages": not {"text", "messages"} & set(value),
        "has both text and messages": {"text", "messages"} <= set(value),
        "text is not a string": "text" in value and not isinstance(text, str),
        "messages are not a list": "messages" in value and not isinstance(messages, list),
        "has a message without role or content": isinstance(messages, list) and not _are_messages(messages),
    }
    wrong = next((fact for fact, holds in facts.items() if holds), None)
    if wrong is not None:
        raise FxquantError(place, f"{wrong}.", f"A document is {KINDS}.")
    return value["text"] if "text" in value else _document(place, messages)


def _are_messages(values: list) -> bool:
    return all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in values
    )


def _are_ids(values: list) -> bool:
    return all(type(token) is int and abs(token) < 1 << 63 for token in values)


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list of something else", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
