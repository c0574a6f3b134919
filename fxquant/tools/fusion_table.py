"""Fusion table: what each fusion pass did to a graph."""

from collections import Counter

from fxquant.lowering.deployment import Deployment, Step
from fxquant.tools.tables import NamedTable


def fusion_table(deployed: Deployment) -> NamedTable:
    """One row per pass: operators before and after, how many it rewrote, and why it skipped the others."""
    headings = ("pass", "rewritten", "operators before", "after", "skipped")
    table = NamedTable("Fused for deployment", headings, prose=("skipped",))
    for step in deployed.steps:
        counts = (len(step.result.rewritten), step.calls_before, step.calls_after)
        table.add_row(step.result.name, *(f"{count:,}" for count in counts), skip_reasons(step))
    if deployed.steps:
        first, last = deployed.steps[0], deployed.steps[-1]
        rewritten = sum(len(step.result.rewritten) for step in deployed.steps)
        table.add_section()
        table.add_row("all", f"{rewritten:,}", f"{first.calls_before:,}", f"{last.calls_after:,}", "")
    return table


def skip_reasons(step: Step) -> str:
    """`4 × its sum stays in float32`, one line per reason, the most frequent first."""
    return "\n".join(f"{count:,} × {reason}" for reason, count in Counter(step.result.skipped.values()).most_common())
