"""Sensitivity plot: the cost of each module alone. Needs matplotlib, which is imported only here."""

from pathlib import Path

from fxquant.errors import FxquantError
from fxquant.evaluation.sensitivity_report import ModuleLoss, Sensitivity

SUFFIXES = (".png", ".svg")
ROW = 0.22
"""Inches of height per module."""


def check_file(path: Path) -> None:
    """Raise FxquantError if `draw` would fail after all the work."""
    if path.suffix not in SUFFIXES:
        raise FxquantError(f"--plot {path}", "is neither .png nor .svg.", "Name a file with one of these suffixes.")
    if not path.absolute().parent.is_dir():
        raise FxquantError(f"--plot {path}", "its folder does not exist.", "Create it first.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FxquantError("--plot", "needs matplotlib.", 'Run pip install "fxquant[plot]".') from None


def draw(result: Sensitivity, path: Path) -> None:
    """One row per module, worst first: KL with its interval, and SQNR beside it, coloured by kind.

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
            selected = [modules[place] for place in rows]
            means = [module.kl.mean for module in selected]
            left.errorbar(means, rows, xerr=_arms(selected), fmt="o", ms=4, lw=1, color=colour, label=kind)
            right.plot([module.sqnr for module in selected], rows, "o", ms=4, color=colour)
        left.set(
            xscale="log", xlabel="KL per token, nats", yticks=places, yticklabels=[module.module for module in modules]
        )
        left.invert_yaxis()
        left.legend(loc="lower right")
        right.set(xlabel="SQNR of its output, dB")
        for axes in (left, right):
            axes.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _arms(modules: list[ModuleLoss]) -> list[list[float]] | None:
    """How far the intervals reach below and above the means; None for a single document."""
    spans = [(module.kl.mean, module.kl.interval) for module in modules]
    known = [(mean, interval) for mean, interval in spans if interval is not None]
    if len(known) < len(spans):
        return None
    return [[max(mean - low, 0) for mean, (low, _) in known], [max(high - mean, 0) for mean, (_, high) in known]]
