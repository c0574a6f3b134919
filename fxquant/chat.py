"""Chats to text, by the template that comes with a tokenizer. Templates are untrusted: they run in jinja2's sandbox."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxquant.errors import FxquantError

if TYPE_CHECKING:
    from jinja2 import Template

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
LONGEST_FACT = 200
Message = dict[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """source: the text of the template, from `file`; tokens: name → text of special tokens, such as bos_token."""

    file: Path
    source: str
    tokens: dict[str, str]

    def render(self, messages: list[Message], place: str, answer: bool = False) -> str:
        """The chat as the model was trained to see it, special tokens as text. `place` is where the chat is from.

        `answer`: with the beginning of the model's answer after it.
        """
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=answer, **self.tokens)
        except Exception as error:  # whatever foreign code may raise
            fact = f"the chat template fails on {place}: {_short(error)}."
            raise FxquantError(self.file, fact, "Give messages that it knows, or text.") from None

    @cached_property
    def _compiled(self) -> "Template":
        """As transformers compiles it, but without a clock: the same chat is the same text on any day."""
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        return environment.from_string(self.source)


def open_chat_template(folder: Path) -> ChatTemplate:
    """The template of a tokenizer's folder: chat_template.jinja, else `chat_template` of tokenizer_config.json, of
    several the one named "default". Raises FxquantError where there is none."""
    config = _read_config(folder / CONFIG)
    values = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in values.items()}
    tokens = {name: text for name, text in texts.items() if isinstance(text, str)}
    if (folder / TEMPLATE).is_file():
        return ChatTemplate(folder / TEMPLATE, _read(folder / TEMPLATE), tokens)
    return ChatTemplate(folder / CONFIG, _default(config.get("chat_template"), folder), tokens)


def _default(template: Any, folder: Path) -> str:
    if isinstance(template, list) and all(isinstance(one, dict) for one in template):
        named = {one.get("name"): one.get("template") for one in template}
        names = ", ".join(sorted(str(name) for name in named))
        if "default" not in named:
            raise FxquantError(folder / CONFIG, f"has chat templates {names}.", f"Put one in {TEMPLATE}.")
        template = named["default"]
    if not isinstance(template, str):
        fact = "no chat template, and the text has chats."
        raise FxquantError(folder, fact, f"Put the model's {TEMPLATE} there, or give text instead of messages.")
    return template


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(file)) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise FxquantError(file, f"not JSON: {error}.", "Copy the file again.") from None
    if not isinstance(config, dict):
        raise FxquantError(file, "not a JSON object.", "Copy the file again.")
    return config


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FxquantError(file, f"cannot be read: {error}.", "Copy the file again.") from None


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    """Jinja's own would escape <, > and & for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


def _short(error: Exception) -> str:
    text = " ".join((str(error) or type(error).__name__).split()).rstrip(".")
    return text if len(text) <= LONGEST_FACT else text[:LONGEST_FACT] + "…"
