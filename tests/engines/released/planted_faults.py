"""Faults planted in the bytes of a folder, seen through released loaders: which ones an engine would serve silently."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from outcome import Outcome, Verdict
from places import ROOT
from safetensors.torch import save_file
from tiny import write_checkpoint
from vllm_ascend_runs import RELEASES, Run, outcomes

import fxquant
from fxquant import CompileOptions, FxquantError
from fxquant.engines.table import Target

sys.path.insert(0, str(ROOT / "tests" / "verification"))

from corruptions import CORRUPTIONS, damaged, open_folder  # noqa: E402, where it lies is known only now

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 128, "n_routed_experts": 2, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
"""As in tests/verification/test_corruption.py, where verification has to name each of these faults."""
GROUPS = """
description: static attention, int4 experts in two groups
extends: deepseek_w4a8
rules: [{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 32}]
"""
FORMS = {"two-level": Target.ASCEND, "per channel": Target.VLLM_ASCEND}
SPLIT = 2
"""Ranks on which a fault of ranks is looked for; experts of two levels are dealt out, as releases load them."""


@dataclass(frozen=True)
class Fault:
    """A damaged folder; `ranks`: on how many it shows; `missed`: said where verification does not name it."""

    name: str
    form: str
    folder: Path
    graph: Path
    ranks: int
    missed: str = ""

    @property
    def run(self) -> Run:
        """On the ranks where it shows."""
        parallel = "ep" if self.form == "two-level" and self.ranks > 1 else "tp"
        return Run(f"{self.name} / {self.form}", self.folder, self.ranks, parallel, graph=self.graph)


def plant(root: Path, verify: bool) -> Iterator[Fault]:
    """Every corruption of both forms; `verify`: by `fxquant verify`, too."""
    source = write_checkpoint(root / "model", **SHAPE)
    (root / "groups.yaml").write_text(GROUPS)
    tokens = root / "ids.safetensors"
    save_file({"ids": torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))}, tokens)
    policies = {"two-level": str(root / "groups.yaml"), "per channel": "deepseek_w4a8_per_channel_static"}
    for form, target in FORMS.items():
        out = root / form
        options = CompileOptions(policy=policies[form], target=target, out=out, calib=tokens, verify=False)
        fxquant.compile(source, options)
        whole = open_folder(out)
        for name, corruption in CORRUPTIONS.items():
            if corruption.fits(whole):
                copy = damaged(out, root / f"{form} {name}", corruption.change)
                missed = _missed(copy, source, target) if verify else ""
                yield Fault(name, form, copy, out, SPLIT if corruption.ranks > 1 else 1, missed)


def _missed(folder: Path, source: Path, target: Target) -> str:
    try:
        report = fxquant.verify(folder, against=source, target=target if target is Target.VLLM_ASCEND else None)
    except FxquantError:
        return ""
    return "" if any(check.misses for check in report.checks) else "**not named**"


Rows = dict[tuple[str, str], dict[str, Outcome]]
"""(fault, form) → release → what became of it."""


def seen(faults: Iterable[Fault], releases: Sequence[str] = RELEASES) -> Rows:
    """All faults on all releases."""
    planted = list(faults)
    rows: Rows = {(fault.name, fault.form): {} for fault in planted}
    named = {fault.run.name: (fault.name, fault.form) for fault in planted}
    for outcome in outcomes(releases, [fault.run for fault in planted]):
        rows[named[outcome.policy]][outcome.release] = outcome
    return rows


SAID = {
    Verdict.REFUSED: "refused",
    Verdict.WRONG: "**served**",
    Verdict.LOADED: "not read",
    Verdict.EQUAL: "not read",
}
"""In the table: loaded with other numbers, or loaded with the right ones, because nothing of it is read."""


def fault_table(rows: Rows, missed: dict[tuple[str, str], str]) -> str:
    """Markdown; `missed`: what verification did not name, if anything."""
    lines = ["| fault | form | " + " | ".join(RELEASES) + " | verify |", "|---" * (3 + len(RELEASES)) + "|"]
    for key, of_release in rows.items():
        cells = [*key, *(SAID[of_release[release].verdict] for release in RELEASES), missed.get(key) or "named"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
