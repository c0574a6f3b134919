"""Chat templates: chats to text, by the template of a tokenizer.

Templates are untrusted: they run in jinja2's sandbox, in a process with bounded time and memory.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fxquant.errors import FxquantError
from fxquant.inputs.json_file import read_json, read_text
from fxquant.inputs.limits import CONFIG_BYTES, TEMPLATE_MEMORY, TEXT_SECONDS
from fxquant.processes.bounded_worker import BoundedWorker, WorkerError

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
Message = dict[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """source: the template text, from `file`; tokens: name → text of special tokens, such as bos_token."""

    file: Path
    text: str
    tokens: dict[str, str]

    def render(self, messages: list[Message], place: str, answer: bool = False) -> str:
        """Render the chat in the model's training format, special tokens as text. Errors name `place`, its origin.

        `answer`: append the opening of the model's answer.
        """
        variables = {**self.tokens, "messages": messages, "add_generation_prompt": answer}
        try:
            return self._worker.ask(TEXT_SECONDS, variables=variables)
        except WorkerError as fault:
            fact = f"the chat template fails on {place}: {fault}."
            raise FxquantError(self.file, fact, "Use messages that it accepts, or plain text.") from None

    @cached_property
    def _worker(self) -> BoundedWorker:
        """One worker for all chats."""
        return BoundedWorker("template", TEMPLATE_MEMORY, TEXT_SECONDS, text=self.text)


def open_chat_template(folder: Path) -> ChatTemplate:
    """The template in a tokenizer's folder: chat_template.jinja, else `chat_template` of tokenizer_config.json; of
    several, the one named "default". Raises FxquantError if there is none."""
    config = _read_config(folder / CONFIG)
    values = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    tokens = {name: text for name, text in texts.items() if isinstance(text, str)}
    if (folder / TEMPLATE).is_file():
        return ChatTemplate(folder / TEMPLATE, read_text(folder / TEMPLATE, CONFIG_BYTES), tokens)
    return ChatTemplate(folder / CONFIG, _default(config.get("chat_template"), folder), tokens)


def _default(template: Any, folder: Path) -> str:
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = {entry.get("name"): entry.get("template") for entry in template}
        names = ", ".join(sorted(str(name) for name in named))
        if "default" not in named:
            raise FxquantError(folder / CONFIG, f"has chat templates {names}, no default.", f"Put one in {TEMPLATE}.")
        template = named["default"]
    if not isinstance(template, str):
        way_out = f"Put the model's {TEMPLATE} there, or use text that is no chat."
        raise FxquantError(folder, "has no chat template.", way_out)
    return template


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(file, CONFIG_BYTES, lenient=True) if file.exists() else {}
    if not isinstance(config, dict):
        raise FxquantError(file, "not a JSON object.", "Copy the file again.")
    return config
