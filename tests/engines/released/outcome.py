"""One run of an engine's own loading code on a compiled folder, and the markdown table of many."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """What became of the folder in the engine's hands."""

    EQUAL = "equal"
    """Loaded; integers are equal, outputs of `apply` equal or within their derived bounds."""
    LOADED = "loaded"
    """Loaded; what the engine holds is equal, nothing was computed."""
    WRONG = "wrong numbers"
    """Loaded without a word, but what the engine holds or computes is not what the folder says."""
    REFUSED = "refused"
    """Stopped by the engine; the words are its own."""

    @property
    def loads(self) -> bool:
        """Whether the folder can be served."""
        return self in (Verdict.EQUAL, Verdict.LOADED)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A cell of the matrix. `words`: the engine's own when refused, the difference when wrong, the bound when equal."""

    engine: str
    release: str
    policy: str
    ranks: int
    parallel: str
    """"tp" or "ep"."""
    verdict: Verdict
    words: str = ""


def table(outcomes: Iterable[Outcome]) -> str:
    """Markdown: a row for each engine, release, parallelism and verdict, with the words on the fewest ranks.

    Policies of which everything is equal share their rows.
    """
    rows: dict[tuple[str, str, str], dict[tuple[str, str], list[Outcome]]] = {}
    for one in outcomes:
        of_policy = rows.setdefault((one.engine, one.release, one.policy), {})
        of_policy.setdefault((one.parallel, one.verdict.value), []).append(one)
    alike: dict[tuple[str, str, tuple[tuple[str, ...], ...]], list[str]] = {}
    for (engine, release, policy), groups in rows.items():
        cells = tuple(
            (parallel.upper(), _listed(group), verdict, min(group, key=lambda one: one.ranks).words)
            for (parallel, verdict), group in groups.items()
        )
        alike.setdefault((engine, release, cells), []).append(policy)
    lines = ["| engine | release | policy | parallel | ranks | verdict | words |", "|---|---|---|---|---|---|---|"]
    for (engine, release, cells), policies in alike.items():
        for parallel, ranks, verdict, words in cells:
            row = (engine, release, "<br>".join(policies), parallel, ranks, verdict, words.replace("|", "\\|"))
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _listed(group: list[Outcome]) -> str:
    return ", ".join(str(ranks) for ranks in sorted({one.ranks for one in group}))
