"""fxquant eval --sensitivity: tables by module and by layer"""

from pathlib import Path

from fxquant.errors import FxquantError
from fxquant.evaluation.sensitivity_report import Divergence, GroupLoss, Sensitivity
from fxquant.progress import Reporter
from fxquant.tools.console import console, print_json
from fxquant.tools.tables import NamedTable


def check_plot(plot: Path | None, sensitivity: bool, engine: bool) -> None:
    """Raise FxquantError, before anything runs, for options that exclude each other or missing matplotlib."""
    if sensitivity and engine:
        raise FxquantError("--sensitivity", "no engine runs one module alone.", "Leave out --as-engine.")
    if plot is None:
        return
    if not sensitivity:
        raise FxquantError("--plot", "only modules are drawn.", "Add --sensitivity.")
    from fxquant.tools.draw_sensitivity import check_file

    check_file(plot)


def show_sensitivity(
    out: Path,
    text: Path,
    against: Path | None,
    samples: int,
    seq_len: int,
    report: Reporter,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure, print, draw."""
    from fxquant.api import sensitivity

    result = sensitivity(out, text, against, samples, seq_len, report)
    if as_json:
        print_json(result.as_json())
    else:
        title = f"{result.tokens:,} tokens in {result.documents} documents of {text.name}, each module quantized alone"
        console.print(modules_table(result, title))
        console.print(groups_table(result))
    if plot is not None:
        from fxquant.tools.draw_sensitivity import draw

        draw(result, plot)


def modules_table(result: Sensitivity, title: str) -> NamedTable:
    """Worst first."""
    table = _table(title, ("module", "scheme"))
    for module in result.worst_first:
        table.add_row(module.module, module.scheme, f"{module.sqnr:.1f}", *_divergence(module.kl))
    return table


def groups_table(result: Sensitivity) -> NamedTable:
    """Rows by layer, by kind, and in total."""
    table = _table("sums over modules quantized alone, and the lowest SQNR", ("", "modules"))
    for groups in (result.layers, result.kinds):
        for group in groups:
            _add(table, group)
        table.add_section()
    _add(table, result.total)
    table.add_row("all quantized at once", str(result.total.modules), "", *_divergence(result.together))
    return table


def _table(title: str, names: tuple[str, ...]) -> NamedTable:
    return NamedTable(title, (*names, "SQNR dB", "KL per token", "95 % interval"), left=("scheme",))


def _add(table: NamedTable, group: GroupLoss) -> None:
    table.add_row(group.name, str(group.modules), f"{group.sqnr:.1f}", *_divergence(group.kl))


def _divergence(kl: Divergence) -> tuple[str, str]:
    return f"{kl.mean:.2e}", "–".join(f"{end:.1e}" for end in kl.interval or ())
