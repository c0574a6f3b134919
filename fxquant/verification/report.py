"""Verification report: checks, their misses, and the verdict."""

from dataclasses import dataclass, field
from typing import Any

from fxquant.runtime.divergence import Divergence


@dataclass
class Check:
    """One line of the table: how many items of a kind were checked, and what was wrong with them."""

    name: str
    total: int
    checked: int = 0
    misses: list[str] = field(default_factory=list)
    worst: str = ""

    @property
    def ok(self) -> bool:
        return not self.misses

    def expect(self, condition: object, miss: str) -> None:
        """Count one item; add `miss` if the condition is false."""
        self.checked += 1
        if not condition:
            self.misses.append(miss)


@dataclass(kw_only=True)
class VerifyReport:
    """All checks of an output folder. `source` is None if there was nothing to compare the weights with.

    `noise` is how far the graph's own logits move under last-bit noise, `end_to_end` how far those of the emitted graph
    are from them on the same tokens, where it can run; None for sampled models.
    `unread`: file → what of it no check has looked at. `partial`: weights are among that, though there is a source.
    """

    checks: list[Check]
    source: str | None
    sampled: bool = False
    partial: bool = False
    noise: Divergence | None = None
    end_to_end: Divergence | None = None
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def verdict(self) -> str:
        """`verified`, `sample verified`, `partly verified`, `structure only`, or `FAILED`."""
        if not self.ok:
            return "FAILED"
        if self.source is None:
            return "structure only"
        if self.partial:
            return "partly verified"
        return "sample verified" if self.sampled else "verified"

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        checks = [
            {"check": c.name, "checked": c.checked, "of": c.total, "misses": c.misses, "worst": c.worst, "ok": c.ok}
            for c in self.checks
        ]
        return {
            "verdict": self.verdict,
            "source": self.source,
            "logit_noise": None if self.noise is None else self.noise.logit,
            "noise": None if self.noise is None else vars(self.noise),
            "end_to_end": None if self.end_to_end is None else vars(self.end_to_end),
            "checks": checks,
            "unread": self.unread,
        }
