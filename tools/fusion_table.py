"""What fusing made of a graph, as a table."""

from collections import Counter

from rich.table import Table

from fxquant.lowering.ascend.deployment import Deployment, Step


def fusion_table(deployed: Deployment) -> Table:
    """A line a pass: operators before and after, how many it rewrote, and why it kept the others."""
    table = Table(title="Fused for deployment", title_justify="left")
    for heading in ("pass", "rewritten", "operators before", "after"):
        table.add_column(heading, justify="left" if heading == "pass" else "right")
    table.add_column("kept")
    for step in deployed.steps:
        counts = (len(step.result.rewritten), step.calls_before, step.calls_after)
        table.add_row(step.result.name, *(f"{count:,}" for count in counts), kept_reasons(step))
    if deployed.steps:
        first, last = deployed.steps[0], deployed.steps[-1]
        rewritten = sum(len(step.result.rewritten) for step in deployed.steps)
        table.add_section()
        table.add_row("all", f"{rewritten:,}", f"{first.calls_before:,}", f"{last.calls_after:,}", "")
    return table


def kept_reasons(step: Step) -> str:
    """`4 × its sum stays in float32`, one line a reason, the most frequent first."""
    return "\n".join(f"{count:,} × {reason}" for reason, count in Counter(step.result.kept.values()).most_common())
