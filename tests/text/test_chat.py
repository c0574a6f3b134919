"""Chats by a tokenizer's template: the ids that transformers makes, one BOS, and what is wrong with a template."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.processes import text_worker
from fxquant.text import chat_template as chat
from fxquant.text.chat_template import open_chat_template
from fxquant.text.load import load_batches

Model = Callable[..., Checkpoint]
BOS, USER, ASSISTANT, EOS = range(4)
SPECIAL = ["<bos>", "<User>", "<Assistant>", "<eos>"]
A, B, C = 4, 5, 6
BODY = """
{%- for message in messages %}
    {%- if message.role == 'user' %}
{{- '<User>' + message['content'] }}
    {%- elif message.role == 'assistant' %}
{{- '<Assistant>' + message['content'] + eos_token }}
    {%- else %}
{{- raise_exception('Unknown role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<Assistant>' }}{% endif %}
"""
TEMPLATE = "{{- bos_token }}" + BODY
CHAT = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
IDS = [BOS, USER, A, B, ASSISTANT, C, EOS]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """`model(chat_template=…)`: special tokens 0 … 3, then a, b, c; the keywords go into tokenizer_config.json."""

    def make(bos: int | None = BOS, **config: Any) -> Checkpoint:
        folder = tmp_path / "model"
        folder.mkdir()
        vocabulary = {word: index for index, word in enumerate([*SPECIAL, "a", "b", "c", "<unk>"])}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return Checkpoint(folder, {"vocab_size": len(vocabulary), "bos_token_id": bos}, {})

    return make


def load(checkpoint: Checkpoint, *lines: Any, length: int = 32) -> list[list[int]]:
    file = checkpoint.folder.parent / "chats.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return [ids for batch in load_batches(file, checkpoint, 100, length) for ids in batch.tolist()]


def fault(checkpoint: Checkpoint) -> FxquantError:
    with pytest.raises(FxquantError) as caught:
        load(checkpoint, CHAT)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and caught.value.remedy
    return caught.value


def test_messages_are_rendered_whatever_they_are_wrapped_in(model: Model, tmp_path: Path) -> None:
    checkpoint = model(chat_template=TEMPLATE)
    assert load(checkpoint, CHAT, {"messages": CHAT, "id": 3}, "a", [C]) == [IDS, IDS, [BOS, A], [C]]
    (tmp_path / "chats.json").write_text(json.dumps([CHAT, {"messages": CHAT}]))
    batches = load_batches(tmp_path / "chats.json", checkpoint, 100, 4)
    assert [batch.tolist() for batch in batches] == [[IDS[:4]]] * 2


def test_the_ids_are_those_of_transformers(model: Model) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = model(chat_template=TEMPLATE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(checkpoint.folder))
    theirs = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert load(checkpoint, CHAT) == [theirs] == [IDS]


@pytest.mark.parametrize("start", ["", "{{ bos_token }}", "{{ bos_token * 2 }}"])
def test_one_bos_however_many_the_template_writes(start: str, model: Model) -> None:
    assert load(model(chat_template=start + BODY), CHAT) == [IDS]


def test_a_model_without_bos_has_what_the_template_writes(model: Model) -> None:
    assert load(model(bos=None, chat_template=BODY), CHAT) == [IDS[1:]]


def test_no_answer_is_asked_for(model: Model) -> None:
    assert load(model(chat_template=TEMPLATE), CHAT[:1]) == [[BOS, USER, A, B]]


# where the template is


def test_a_file_of_its_own_comes_first(model: Model) -> None:
    checkpoint = model(chat_template="b")
    (checkpoint.folder / "chat_template.jinja").write_text(TEMPLATE)
    assert load(checkpoint, CHAT) == [IDS]


def test_of_named_templates_the_default_is_taken(model: Model) -> None:
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": TEMPLATE}]
    assert load(model(chat_template=named), CHAT) == [IDS]


def test_named_templates_without_a_default_are_refused(model: Model) -> None:
    error = fault(model(chat_template=[{"name": "tool_use", "template": "b"}, {"name": "rag", "template": "c"}]))
    assert error.fact == "has chat templates rag, tool_use, no default." and "chat_template.jinja" in error.remedy


@pytest.mark.parametrize("config", [{}, {"chat_template": None}, {"chat_template": 3}, {"chat_template": [1]}])
def test_a_model_without_template_is_refused(config: dict[str, Any], model: Model) -> None:
    checkpoint = model(**config)
    error = fault(checkpoint)
    assert error.place == str(checkpoint.folder) and "no chat template" in error.fact
    assert "chat_template.jinja" in error.remedy and load(checkpoint, "a") == [[BOS, A]]


def test_tokens_may_be_objects_or_absent(model: Model) -> None:
    tokens = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": None, "add_bos_token": True}
    template = open_chat_template(model(chat_template="", **tokens).folder)
    assert template.tokens == {"bos_token": "<bos>"}


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_configuration_is_refused(text: str, model: Model) -> None:
    checkpoint = model()
    (checkpoint.folder / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
    assert fault(checkpoint).place == str(checkpoint.folder / "tokenizer_config.json")


# what templates do


@pytest.mark.parametrize(
    ("template", "fact"),
    [
        ("{{ raise_exception('only\ntools') }}", "only tools"),
        ("{% if %}", "Expected an expression"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{{ raise_exception('x' * 10000) }}", "xxx…"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'tokenizer.json' %}", "no loader"),
    ],
)
def test_a_template_that_fails_is_named_with_the_chat(template: str, fact: str, model: Model) -> None:
    checkpoint = model(chat_template=template)
    error = fault(checkpoint)
    assert error.place == str(checkpoint.folder / "tokenizer_config.json")
    assert fact in error.fact and "chats.jsonl:1" in error.fact


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = {
    "a string": "{{ 'a' * 10 ** 10 }}",
    "a list": "{{ ([1] * 10 ** 10) | length }}",
    "join": "{{ ['a' * 10 ** 6] * 10 ** 6 | join }}{{ (['a' * 10 ** 6] * 10 ** 6) | join }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "indent": "{{ ('a\n' * 10 ** 6) | indent(10 ** 6) }}",
    "format": "{{ '%10000000000d' | format(1) }}",
    "method": "{{ 'a'.ljust(10 ** 10) }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
}


SLOW = ("join", "indent", "doubling", "power")


@pytest.mark.parametrize(
    "template",
    [pytest.param(template, marks=[pytest.mark.slow] if name in SLOW else []) for name, template in HUGE.items()],
    ids=HUGE,
)
def test_a_template_that_blows_up_ends(template: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TEXT_SECONDS", 2)
    assert "the chat template fails on" in fault(model(chat_template=template)).fact


def test_a_template_that_loops_for_ever_ends_and_the_next_chat_is_rendered(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "TEXT_SECONDS", 0.5)
    source = "{% if messages | length > 1 %}" + ENDLESS + "{% endif %}a"
    template = open_chat_template(model(chat_template=source).folder)
    for _ in range(2):
        with pytest.raises(FxquantError, match=r"fails on here: it exceeds (0\.5 s of CPU time|1 s)"):
            template.render(CHAT, "here")
        assert template.render(CHAT[:1], "here") == "a"


def test_many_chats_are_one_process(model: Model) -> None:
    template = open_chat_template(model(chat_template="{{ messages[0].content }}").folder)
    first = template.render([{"role": "user", "content": "a"}], "here")
    process = template._worker._process
    texts = [template.render([{"role": "user", "content": str(index)}], "here") for index in range(200)]
    assert first == "a" and texts == [str(index) for index in range(200)] and template._worker._process is process


def test_a_process_that_nobody_waits_for_ends_by_itself() -> None:
    """As after a kill of the command, in the middle of a chat."""
    command = [sys.executable, "-P", text_worker.__file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None and process.stdout is not None
    first = {"open": "template", "text": ENDLESS, "memory": 256 << 20, "seconds": 5, "wall": 60}
    chats = json.dumps({"variables": {}, "seconds": 0.5, "wall": 1})
    process.stdin.write((json.dumps(first) + "\n").encode())
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == {"answer": ""}
    process.stdin.write((chats + "\n").encode())
    process.stdin.close()
    process.stdout.close()
    assert process.wait(60) in (-signal.SIGPROF, -signal.SIGALRM)


@pytest.mark.parametrize("token", [{}, {"content": 5}, {"content": None}, [], 1, None], ids=str)
def test_a_token_that_is_no_text_is_absent(token: Any, model: Model) -> None:
    assert open_chat_template(model(chat_template="", bos_token=token).folder).tokens == {"eos_token": "<eos>"}


def test_an_unknown_role_is_the_templates_error(model: Model) -> None:
    with pytest.raises(FxquantError, match="Unknown role critic"):
        load(model(chat_template=TEMPLATE), [{"role": "critic", "content": "a"}])


def test_lines_of_blocks_leave_no_space_and_json_is_plain(model: Model) -> None:
    """trim_blocks and lstrip_blocks, break and tojson, as templates are written for."""
    source = "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m | tojson }}\n{% endfor %}"
    template = open_chat_template(model(chat_template=source).folder)
    assert template.render([{"role": "é", "content": "<a & b>"}, CHAT[1]], "here") == (
        '{"role": "é", "content": "<a & b>"}\n'
    )
