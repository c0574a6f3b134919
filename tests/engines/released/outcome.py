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
    """Markdown: a row for each engine, release, policy, parallelism and verdict; ranks of equal words are one row."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for one in outcomes:
        key = (one.engine, one.release, one.policy, one.parallel, one.verdict.value, one.words)
        rows.setdefault(key, []).append(one.ranks)
    lines = ["| engine | release | policy | parallel | ranks | verdict | words |", "|---|---|---|---|---|---|---|"]
    for (engine, release, policy, parallel, verdict, words), ranks in rows.items():
        listed = ", ".join(str(rank) for rank in sorted(set(ranks)))
        cells = (engine, release, policy, parallel.upper(), listed, verdict, words.replace("|", "\\|"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
