"""Damaged folders in released SGLang: what it stops at, what it would have served without a word.

`tests/verification/test_corruption.py` shows that `fxquant verify` names every one of them for this target.
`pytest -s -m engines tests/engines/released/test_sglang_damage.py` prints what the newest release did.
"""

import sys
from pathlib import Path

import pytest
from sglang_cases import RELEASES, STATIC, Case, Folders, run
from sglang_runs import serves

pytestmark = pytest.mark.engines

sys.path.append(str(Path(__file__).parents[2] / "verification"))
from corruptions import CORRUPTIONS, damaged, open_folder  # noqa: E402

STOPS = {"input_offset one more", "q_a and kv_a input_scale unequal"}
"""One input scale and offset for both: the engine looks."""
HARMLESS = {
    "scale_bias columns one rank on", "two scale_bias columns swapped", "weight_scale in bfloat16",
    "weight_offset not zero", "extra tensor in a module", "extra tensor of no module", "type of one tensor stale",
    "type of one module stale", "group_size stale", "moe_quantize of config.json stale",
}  # fmt: skip
"""Columns are summed; the values of these scales fit into bfloat16; the rest it does not read."""


@pytest.fixture(scope="module")
def damages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Name of a corruption → the folder that has it."""
    place = tmp_path_factory.mktemp("damaged")
    right = Folders(place / "right").get(STATIC)
    fitting = {name: one for name, one in CORRUPTIONS.items() if one.fits(open_folder(right))}
    return {
        name: Case(str(damaged(right, place / name.replace(" ", "-"), one.change)), truth=str(right))
        for name, one in fitting.items()
    }


@pytest.mark.parametrize("release", RELEASES[-1:])
def test_what_is_neither_stopped_nor_harmless_would_have_been_served(
    damages: dict[str, Case], release: str, tmp_path: Path
) -> None:
    findings = dict(zip(damages, run(release, damages.values(), tmp_path / "found.json"), strict=True))
    print(f"\nSGLang {release}")
    for name, finding in findings.items():
        print(f"{name}: {finding['stopped'] or finding['wrong'][:1] or 'nothing differs'}")
    assert {name for name, finding in findings.items() if finding["stopped"]} == STOPS
    assert {name for name, finding in findings.items() if serves(finding)} == HARMLESS
