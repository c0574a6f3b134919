"""benchmarks/accuracy.py: every variation of docs/accuracy.md is a policy, and a table goes on where it was killed."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from places import EXAMPLE, ROOT
from tiny import float_program
from token_files import token_ids

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.passes import AssignSchemes, FindRotation, PairSmoothing
from fxquant.policy.policy import load_policy, shipped_policies
from fxquant.schemes.schemes import Scheme

CHANGES = yaml.safe_load((ROOT / "benchmarks" / "accuracy_changes.yaml").read_text(encoding="utf-8"))
W4 = [
    name for name in shipped_policies() if any(rule.scheme is Scheme.W4A8_DYNAMIC for rule in load_policy(name).rules)
]


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("accuracy", ROOT / "benchmarks" / "accuracy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "accuracy", module)
    spec.loader.exec_module(module)
    yield module


@pytest.mark.parametrize("base", W4)
def test_every_variation_is_a_policy(
    accuracy: ModuleType, tiny: Callable[..., Checkpoint], tmp_path: Path, base: str
) -> None:
    """It has a rule for each module, none that decides nothing, and its algorithm everywhere."""
    for label, text in accuracy.variations(base, CHANGES):
        (tmp_path / "one.yaml").write_text(text)
        policy, program = load_policy(str(tmp_path / "one.yaml")), float_program(tiny())
        for program_pass in (AssignSchemes(policy), FindRotation(policy), PairSmoothing(policy)):
            program_pass(program)
        asked = CHANGES[label.removeprefix(f"{base}, ")].get("each_rule", {}).get("algorithm", "min_max")
        if "int8" not in label:
            assert {recipe.algorithm.value for recipe in program.recipes.values()} == {asked}, label
            as_base = float_program(tiny())
            AssignSchemes(load_policy(base))(as_base)
            assert {name: (recipe.scheme, recipe.group_size) for name, recipe in program.recipes.items()} == {
                name: (recipe.scheme, recipe.group_size) for name, recipe in as_base.recipes.items()
            }, label


def test_a_table_goes_on(
    accuracy: ModuleType, tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is not computed again, also where the last line was cut short; and it prints the same."""
    ids = token_ids(tmp_path / "ids.safetensors", seed=1)
    changes = tmp_path / "changes.yaml"
    changes.write_text("hadamard: {rotate: [hidden]}")
    rows, first, second = (tmp_path / name for name in ("rows.jsonl", "first.md", "second.md"))
    command: list[Any] = ["accuracy.py", tiny_folder(), "--text", ids, "-o", rows, "--samples", 2]
    command += ["--seq-len", 16, "--policies", "deepseek_w4a8_dynamic", "--vary", "deepseek_w4a8_dynamic"]
    command += ["--changes", changes, "--markdown"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in (*command, first)])
    assert accuracy.main() == 0
    text = rows.read_text(encoding="utf-8")
    assert [json.loads(line)["label"] for line in text.splitlines()] == [
        "deepseek_w4a8_dynamic",
        "deepseek_w4a8_dynamic, hadamard",
    ]
    rows.write_text(text + '{"model": "cut sh', encoding="utf-8")
    monkeypatch.setattr(accuracy.Scorer, "row", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(sys, "argv", [str(part) for part in (*command, second)])
    assert accuracy.main() == 0
    assert rows.read_text(encoding="utf-8") == text and first.read_text() == second.read_text()


def test_a_policy_that_does_not_fit_fails_the_run(
    accuracy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("extends: deepseek_w4a8\nrules: [{kind: other, scheme: FLOAT}]")
    command: list[Any] = ["accuracy.py", EXAMPLE, "--text", EXAMPLE / "evaluation.jsonl", "-o", tmp_path / "rows.jsonl"]
    command += ["--samples", 1, "--seq-len", 8, "--policies", tmp_path / "bad.yaml"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    assert accuracy.main() == 1
    assert "the model has no module of that kind" in capsys.readouterr().err and not (tmp_path / "rows.jsonl").exists()
