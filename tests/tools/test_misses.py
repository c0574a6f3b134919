"""What `fxquant verify` prints of many misses: one line for those that differ in numbers alone, at most a screen."""

import pytest
from commands import Fxquant

from fxquant.tools.verify import SHOWN_MISSES, alike
from fxquant.verification.report import Check, VerifyReport

SCREEN = 24
EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj"


def report(*checks: Check) -> VerifyReport:
    return VerifyReport(checks=list(checks), source="model")


def failed(name: str, *misses: str) -> Check:
    return Check(name, 100, 100, list(misses))


def test_misses_that_differ_in_numbers_are_alike() -> None:
    ups = [
        f"{EXPERT.format(layer, expert, 'up')}: off by 0.0{layer}e-{expert}" for layer in (1, 2) for expert in (1, 22)
    ]
    assert alike([ups[0], "other", *ups[1:]]) == [ups, ["other"]]
    assert len(alike(["a: W4A8_DYNAMIC", "a: W8A8_DYNAMIC"])) == 2  # a scheme is no number


@pytest.mark.parametrize("checks", [1, 5, 15])
def test_many_misses_are_one_screen(checks: int, fxquant_: Fxquant, monkeypatch: pytest.MonkeyPatch) -> None:
    misses = [f"{EXPERT.format(layer, 7, part)}: differs" for part in ("gate", "up", "down") for layer in range(40)]
    misses += [f"odd tensor {chr(97 + number)}" for number in range(20)]
    made = report(*(failed(f"check {number}", *misses) for number in range(checks)))
    monkeypatch.setattr("fxquant.api.verify", lambda *arguments: made)
    code, text, _ = fxquant_("verify", "out", "-q")
    below = text[text.rindex("┘") + 1 :].strip().splitlines()
    assert code == 1 and len(below) <= max(SCREEN, 2 * checks)
    assert below[0] == f"✗ check 0: {misses[0]} (and 39 more like it)"
    assert all(f"✗ check {number}: " in text for number in range(checks))
    shown = sum("✗" in line for line in below) // checks
    assert shown == max(1, SHOWN_MISSES // checks) and "more; --json has all" in below[-1]
