"""Whatever a policy file has in it, it is loaded or refused in the words of a policy, at once."""

import random
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from pydantic import ValidationError
from pydantic_core._pydantic_core import list_all_errors

from fxquant.errors import FxquantError
from fxquant.inputs.validation import wrong_values
from fxquant.policy.policy import load_policy, shipped_policies
from fxquant.policy.policy_file import PolicyFile

INSIDES = ("Extra inputs", "str-enum", "literal[", "unicode string", "nput should", "pydantic", "function-")
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.dates(), st.binary(max_size=4),
    st.sampled_from(["FLOAT", "W8A8", "norm", "mtp", "*", "flex", "hidden", "float", "deepseek_w4a8", "1e5", "yes"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda leaf: st.lists(leaf, max_size=3) | st.dictionaries(st.text(max_size=6), leaf, max_size=3),
    max_leaves=6,
)
RULE_KEYS = ("kind", "path", "scheme", "group_size", "algorithm", "optional", "why", "method", "pair", "alpha")
RULES = st.lists(st.dictionaries(st.sampled_from(RULE_KEYS), LEAVES | VALUES, max_size=4), max_size=3)
DOCUMENTS = st.dictionaries(st.sampled_from(sorted(PolicyFile.model_fields)), RULES | VALUES, max_size=5) | VALUES


def loaded_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.yaml"
        path.write_bytes(content)
        try:
            load_policy(str(path))
        except FxquantError as error:
            text = str(error).replace(folder, "")
            assert len(text) < 1500 and text.isprintable() and not [word for word in INSIDES if word in text], text
            assert error.remedy


@settings(max_examples=150)
@given(DOCUMENTS)
def test_documents(document: Any) -> None:
    loaded_or_refused(yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "replace"))


@settings(max_examples=150)
@given(st.sampled_from(shipped_policies()), st.integers(0, 2**32), st.integers(1, 6))
def test_changed_bytes_of_shipped_files(name: str, seed: int, changes: int) -> None:
    chance = random.Random(seed)
    folder = ROOT / "fxquant" / "policy" / "shipped"
    content = bytearray((folder / f"{name}.yaml").read_bytes())
    for _ in range(changes):
        place = chance.randrange(len(content))
        piece = chance.choice(
            [b"", b"\n", b"\t", b": ", b"- ", b"&a ", b"*a", b"!!int ", b"[", b"}", b"\xff", b"'", b"%", b"|"]
        )
        content[place : place + chance.randrange(3)] = piece
    loaded_or_refused(bytes(content))


def test_every_kind_of_fault_has_words_of_its_own() -> None:
    """pydantic's own sentence is never shown, for any error that it knows."""
    for known in list_all_errors():
        context = dict(known.get("example_context") or {})
        if known["type"] in ("value_error", "assertion_error"):
            context = {"error": ValueError("does not fit")}
        line = {"type": known["type"], "loc": ("rules", 0, "scheme"), "input": "x", "ctx": context}
        error = ValidationError.from_exception_data("policy", [line])  # type: ignore[list-item]
        (value,) = wrong_values(error, PolicyFile, {"rules": [{"scheme": "x"}]}, quoted=False)
        key = "rules.0.scheme: "
        assert value.fact.startswith(key) and error.errors()[0]["msg"] not in value.fact, known["type"]
        assert not [word for word in INSIDES if word in value.fact], value
