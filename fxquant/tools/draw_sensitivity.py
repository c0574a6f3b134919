"""A picture of what each module costs alone. Needs matplotlib, which is imported here and nowhere else."""

from pathlib import Path

from fxquant.errors import FxquantError
from fxquant.evaluation.sensitivity_report import ModuleLoss, Sensitivity

SUFFIXES = (".png", ".svg")
ROW = 0.22
"""Inches of height that a module takes."""


def check_file(path: Path) -> None:
    """Raises FxquantError where `draw` would fail after the work was done."""
    if path.suffix not in SUFFIXES:
        raise FxquantError(f"--plot {path}", "neither .png nor .svg.", "Name a file with one of these suffixes.")
    if not path.absolute().parent.is_dir():
        raise FxquantError(f"--plot {path}", "its folder is not there.", "Make it first.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FxquantError("--plot", "needs matplotlib.", 'Run pip install "fxquant[plot]".') from None


def draw(result: Sensitivity, path: Path) -> None:
    """One row a module, worst first: KL with its interval, and SQNR beside it, coloured by kind.

    The same result gives the same bytes of SVG.
    """
    import matplotlib
    from matplotlib.figure import Figure

    modules = result.worst_first
    colours = {group.name: f"C{index}" for index, group in enumerate(result.kinds)}
    places = range(len(modules))
    with matplotlib.rc_context({"svg.hashsalt": "fxquant", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(9, 1.2 + ROW * len(modules)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        for kind, colour in colours.items():
            rows = [place for place in places if modules[place].kind.value == kind]
            chosen = [modules[place] for place in rows]
            means = [one.kl.mean for one in chosen]
            left.errorbar(means, rows, xerr=_arms(chosen), fmt="o", ms=4, lw=1, color=colour, label=kind)
            right.plot([one.sqnr for one in chosen], rows, "o", ms=4, color=colour)
        left.set(xscale="log", xlabel="KL per token, nats", yticks=places, yticklabels=[one.module for one in modules])
        left.invert_yaxis()
        left.legend(loc="lower right")
        right.set(xlabel="SQNR of its output, dB")
        for axes in (left, right):
            axes.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _arms(modules: list[ModuleLoss]) -> list[list[float]] | None:
    """How far the intervals reach below and above the means; none where one document was scored."""
    spans = [(one.kl.mean, one.kl.interval) for one in modules]
    known = [(mean, interval) for mean, interval in spans if interval is not None]
    if len(known) < len(spans):
        return None
    return [[max(mean - low, 0) for mean, (low, _) in known], [max(high - mean, 0) for mean, (_, high) in known]]
