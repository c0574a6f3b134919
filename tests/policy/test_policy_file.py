"""Policy files: every fault by file, line, key and value, with the nearest right word; nothing takes long or much."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fxquant.errors import FxquantError
from fxquant.inputs.limits import NESTING, POLICY_BYTES, POLICY_DEPTH, POLICY_VALUES
from fxquant.policy.policy import Policy, load_policy, shipped_policies

INSIDES = (
    "Extra inputs",
    "str-enum",
    "literal[",
    "unicode string",
    "Input should",
    "pydantic",
    "Traceback",
    "function-",
)
Refused = Callable[..., FxquantError]


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """`refused(text)`: how a file of such text or bytes is refused."""

    def error_of(content: str | bytes) -> FxquantError:
        path = tmp_path / "mine.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        start = time.monotonic()
        with pytest.raises(FxquantError) as caught:
            load_policy(str(path))
        assert time.monotonic() - start < 10
        error = caught.value
        assert error.place.startswith(str(path)) and error.remedy
        assert len(str(error).replace(str(tmp_path), "")) < 600 and "\n" not in str(error)
        assert str(error).isprintable() and not [word for word in INSIDES if word in str(error)]
        return error

    return error_of


def line_of(error: FxquantError) -> int:
    return int(error.place.rpartition(":")[2])


RULE = "rules:\n- kind: attention\n  scheme: "


@pytest.mark.parametrize(
    ("text", "line", "fact"),
    [
        ("\nactivation: min_max", 2, "activation: unknown key. Did you mean activation_statistic?"),
        ("rules:\n  - {kind: norm, scheme: FLOAT,\n     bits: 4}", 3, "rules.0.bits: unknown key."),
        (f"{RULE}W8A8\n  optinal: true", 4, "rules.0.optinal: unknown key. Did you mean optional?"),
        (
            f"{RULE}W3A8",
            3,
            "W3A8 is not one of FLOAT, W8A8, W8A8_MIX, W8A8_DYNAMIC, W4A8_DYNAMIC, LEAVE_OUT. Did you mean",
        ),
        (f"{RULE}w8a8_dynamc", 3, "Did you mean W8A8_DYNAMIC?"),
        (f"{RULE}", 3, "rules.0.scheme: null is not one of FLOAT"),
        (f"{RULE}[W8A8]", 3, "rules.0.scheme: a list is not one of FLOAT"),
        ("rules: [{kind: norm}]", 1, "rules.0.scheme: required, and missing"),
        ("rules:\n- {kind: norm, schem: FLOAT}", 2, "rules.0.schem: unknown key. Did you mean scheme?"),
        ("rules:\n- kind: layernorm\n  scheme: FLOAT", 2, "rules.0.kind: layernorm is not one of embedding, norm,"),
        ("rules:\n- kind: [norm,\n    gates]\n  scheme: FLOAT", 3, "rules.0.kind.1: gates is not one of"),
        ("rules: [{scheme: FLOAT}]", 1, "rules.0: a rule needs a kind or a path"),
        (f"{RULE}W4A8_DYNAMIC\n  group_size: 100", 4, "rules.0.group_size: 100 is not one of 0, 32, 64, 128, 256"),
        (f"{RULE}W4A8_DYNAMIC\n  group_size: -64", 4, "rules.0.group_size: -64 is not one of"),
        (f"{RULE}W4A8_DYNAMIC\n  group_size: true", 4, "rules.0.group_size: true, not an integer"),
        (f"{RULE}W4A8_DYNAMIC\n  group_size: {'9' * 6000}", 4, "has too many digits"),
        (f"{RULE}W8A8\n  group_size: 64", 2, "group_size is for W4A8_DYNAMIC, not for W8A8"),
        ("rules: [{kind: mtp, scheme: LEAVE_OUT, group_size: 64}]", 1, "not for LEAVE_OUT"),
        (f"{RULE}W8A8\n  optional: perhaps", 4, "rules.0.optional: perhaps, not true or false"),
        (f"{RULE}W8A8\n  path: a b", 4, "rules.0.path: 'a b' is not a shell pattern of a module path"),
        (f"{RULE}W8A8\n  path: {'a.' * 300}", 4, "is not a shell pattern of a module path"),
        (
            "activation_statistic: median",
            1,
            "activation_statistic: median is not one of min_max, batch_mean, percentile",
        ),
        (
            "calibration_weights: flaot",
            1,
            "calibration_weights: flaot is not one of float, rounded. Did you mean float?",
        ),
        ("percentile: .nan", 1, "percentile: .nan, not a number"),
        ("percentile: nan", 1, "percentile: nan, not a finite number"),
        ("percentile: 40", 1, "percentile: 40 is not greater than 50"),
        ("percentile: 2020-99-99", 1, "percentile: 2020-99-99, not a number"),
        ("smooth: {method: flex}", 1, "smooth: a mapping, not a list"),
        ("smooth:\n- method: m4\n  alpha: 2", 3, "smooth.0.alpha: 2 is more than 1"),
        ("smooth: [{method: awq}]", 1, "smooth.0.method: awq is not one of none, smoothquant, m4, flex"),
        ("rotate: [hiden]", 1, "rotate.0: hiden is not one of hidden, heads. Did you mean hidden?"),
        ("norm_bias: all", 1, "norm_bias: all is not one of shifted, every"),
        ("rules:", 1, "rules: empty, not a list"),
        ("- rules", 1, "the document is a list, not keys and values"),
        ("rules", 1, "the document is text, not keys and values"),
        ("description: [a]", 1, "description: a list, not text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_value_is_named_with_its_line(text: str, line: int, fact: str, refused: Refused) -> None:
    error = refused(text)
    assert (line_of(error), fact in error.fact) == (line, True), error


@pytest.mark.parametrize(
    ("text", "line", "fact"),
    [
        ("rules: [", 1, "not valid YAML"),
        ("rules:\n\t- kind: norm", 2, "a tab where only spaces are allowed"),
        ("description: a: b", 1, "text that contains “: ” needs quotes"),
        ("rules:\n- kind: norm\n scheme: FLOAT", 3, "not valid YAML"),
        ("a: 1\nb: 2\na: 3", 3, "duplicate key a, first on line 1"),
        ("rules:\n- {kind: norm, kind: gate}", 2, "duplicate key kind"),
        ("? [a]\n: 1", 1, "a key that is not text"),
        ("percentile: !!int zz", 1, "tag !!int: tags are not supported"),
        ("percentile: !!timestamp 2020-99-99", 1, "tag !!timestamp"),
        ("x: !!python/object/apply:os.system [id]", 1, "tag !!python/object/apply:os.system"),
        ("\nx: !!python/name:os.system", 2, "tag !!python/name"),
        ("x: " + "[" * 10_000, 1, f"nested more than {NESTING} levels deep"),
        ("- " * 10_000, 1, f"nested more than {NESTING} levels deep"),
        ("\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 99))]), 63, "nested more than"),
        ("\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]), 13, "more than"),
        ("\n".join(["a0: &a0 {k: v}", *(f"a{i}: &a{i} {{<<: *a{i - 1}, k{i}: [*a{i - 1}]}}" for i in range(1, 60))]),
         13, f"more than {POLICY_VALUES:,} values"),
        ("a: &a [*a]", 1, "alias *a refers to itself"),
        ("a: *b", 1, "alias *b has no anchor"),
        ("a: {<<: b}", 1, "<< merges mappings"),
        ("a: 1\n---\na: 2", 2, "a second document begins"),
        ('description: "\\ud800"', 1, r"a lone surrogate: '\ud800'"),
        ("a: 1\nb: \x1b[31m", 2, r"character '\x1b' is not allowed"),
        ("%YAML " + "9" * 6000 + ".1\n---\na: 1", 1, "not valid YAML"),
        ('a: "\\UFFFFFFFF"', 1, "not valid YAML"),
        ("x: [" + "a, " * (POLICY_BYTES // 4) + "]", 1, f"more than {POLICY_VALUES:,} values"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_no_policy_is_refused_by_line(text: str, line: int, fact: str, refused: Refused) -> None:
    error = refused(text)
    assert fact in error.fact, error
    assert error.place.endswith(".yaml") or line_of(error) == line, error


def test_not_utf8(refused: Refused) -> None:
    assert "not valid UTF-8 at byte 13" in refused(b"description: \xff\xfe").fact


def test_a_large_file(refused: Refused) -> None:
    assert f"more than {POLICY_BYTES:,} bytes" in refused("#" * (POLICY_BYTES + 1)).fact


def test_several_faults_have_a_line_each(refused: Refused) -> None:
    error = refused("rules:\n" + "".join(f"- {{kind: norm, scheme: W{bits}}}\n" for bits in range(9)))
    assert line_of(error) == 2
    assert [f"Line {line}: rules.{line - 2}" in error.fact for line in (3, 4, 5, 6)] == [True, True, True, False]
    assert error.fact.endswith("And 5 more.")


@pytest.mark.parametrize("kind", ["folder", "pipe", "unreadable"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    with pytest.raises(FxquantError) as caught:
        load_policy(str(path))
    assert str(path) in caught.value.place and caught.value.remedy


# what is no type of YAML's


def loaded(tmp_path: Path, text: str, name: str = "mine.yaml") -> Policy:
    (tmp_path / name).write_text(text)
    return load_policy(str(tmp_path / name))


@pytest.mark.parametrize("word", ["no", "2024-01-01", "1e3", "0x1f", "12:30:45", "true", "=", "<<"])
def test_a_plain_word_is_text(word: str, tmp_path: Path) -> None:
    assert loaded(tmp_path, f"description: {word}").description == word


def test_aliases_and_merged_keys(tmp_path: Path) -> None:
    text = "rules:\n- &int4 {kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 64}\n- {<<: *int4, kind: head}\n"
    first, second = loaded(tmp_path, text).rules
    assert (str(first), str(second)) == (
        "routed_expert → W4A8_DYNAMIC group_size 64", "head → W4A8_DYNAMIC group_size 64",
    )  # fmt: skip


def test_rules_know_their_lines(tmp_path: Path) -> None:
    policy = loaded(tmp_path, "extends: float\nrules:\n- {kind: norm, scheme: FLOAT}\n\n- {kind: gate, scheme: FLOAT}")
    assert [policy.lines[rule] for rule in policy.own] == [f"{tmp_path}/mine.yaml:{line}" for line in (3, 5)]
    assert {policy.lines[rule] for rule in policy.inherited} == {"policy float"}


# names


@pytest.mark.parametrize(
    ("name", "near"), [("deepseek_w2a8", "deepseek_w8a8"), ("Float", "float"), ("deepseek_w4a8_dynamc", "_dynamic")]
)
def test_an_unknown_name_is_refused_with_the_known_ones(name: str, near: str) -> None:
    with pytest.raises(FxquantError, match=f"policy {name}: unknown") as caught:
        load_policy(name)
    assert f"{near}?" in caught.value.remedy
    assert all(known in caught.value.remedy for known in shipped_policies())


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "q"])
def test_a_name_like_none(name: str) -> None:
    with pytest.raises(FxquantError, match="unknown") as caught:
        load_policy(name)
    assert "Did you mean" not in caught.value.remedy and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["missing.yaml", "./missing.yml", "folder/missing", "x" * 300 + ".yaml", "a\0.yaml"])
def test_a_missing_file_is_no_unknown_policy(name: str, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"no such policy file|cannot be read") as caught:
        load_policy(str(tmp_path / name))
    assert "unknown" not in str(caught.value) and caught.value.remedy


def test_a_missing_file_is_named_with_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smooth.yaml").write_text("")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(FxquantError, match=r"smoth\.yaml: no such policy file\. Did you mean .*/smooth\.yaml\?"):
        load_policy(str(tmp_path / "smoth.yaml"))
    with pytest.raises(FxquantError, match=r"drop folder and suffix: deepseek_w4a8\."):
        load_policy(str(tmp_path / "deepseek_w4a8.yaml"))
    with pytest.raises(FxquantError, match=r"its name does not end in \.yaml"):
        load_policy(str(tmp_path / "text.txt"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FxquantError, match=r"Did you mean smooth\.yaml\?"):
        load_policy("smooth")


# extending


def test_extends_is_relative_to_the_file_that_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "base.yaml").write_text("description: base\nextends: b/last.yaml")
    (tmp_path / "a" / "b" / "last.yaml").write_text("extends: float")
    (tmp_path / "base.yaml").write_text("rules: 5")
    monkeypatch.chdir(tmp_path)
    policy = loaded(tmp_path / "a", "extends: base.yaml")
    assert policy.rules == load_policy("float").rules
    assert load_policy("a/mine.yaml") == policy


@pytest.mark.parametrize(
    ("parent", "fact"),
    [
        ("deepseek_v9", "extends policy deepseek_v9: unknown"),
        ("other.yaml", "other.yaml: no such policy file"),
        ("sub/other", "sub/other: no such policy file"),
    ],
)
def test_an_unknown_parent_is_refused_by_its_line(parent: str, fact: str, refused: Refused) -> None:
    error = refused(f"description: x\nextends: {parent}")
    assert (line_of(error), fact in str(error)) == (2, True), error


def test_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "second.yaml").write_text(f"description: x\nextends: ../{tmp_path.name}/mine.yaml")
    with pytest.raises(FxquantError, match="extends itself") as caught:
        loaded(tmp_path, "extends: ./second.yaml")
    assert caught.value.place == f"{tmp_path}/second.yaml:2"
    assert f"{tmp_path}/mine.yaml → {tmp_path}/second.yaml → " in caught.value.fact


def test_thousands_of_files_are_not_followed(tmp_path: Path) -> None:
    for index in range(POLICY_DEPTH + 1):
        (tmp_path / f"{index}.yaml").write_text(f"extends: {index + 1}.yaml")
    (tmp_path / f"{POLICY_DEPTH + 1}.yaml").write_text("extends: float")
    with pytest.raises(FxquantError, match=f"more than {POLICY_DEPTH} policies extend one another"):
        load_policy(str(tmp_path / "0.yaml"))
    assert load_policy(str(tmp_path / "3.yaml")).rules == load_policy("float").rules
