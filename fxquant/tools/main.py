"""The `fxquant` command."""

import sys

import typer

from fxquant.tools import bench, compare, compile_model, convert, evaluate, generate, plan, show, targets, verify
from fxquant.tools.boundary import guarded
from fxquant.tools.console import console
from fxquant.tools.signals import Signals, leave
from fxquant.tools.verbs import Verb, Verbs

EXIT_CODES = (
    "Exit codes: 0 done; 1 wrong input, failed verification, or stopped by the machine; 2 wrong usage of the command "
    "line; 70 a fault of fxquant itself; 130 Ctrl-C; 141 the reader of a pipe is gone; 143 SIGTERM."
)
app = typer.Typer(
    name="fxquant",
    help="Compile quantized DeepSeek-V3/R1 models: a torch.fx graph in, Ascend weights and graphs or ONNX out.",
    epilog=EXIT_CODES,
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _main(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        import fxquant

        console.print(fxquant.__version__)
        raise typer.Exit


app.command("compile", cls=Verb)(compile_model.command)
app.command("plan", cls=Verb)(plan.command)
app.command("verify", cls=Verb)(verify.command)
app.command("run", cls=Verb)(generate.command)
app.command("bench", cls=Verb)(bench.command)
app.command("eval", cls=Verb)(evaluate.command)
app.command("compare", cls=Verb)(compare.command)
app.command("show", cls=Verb)(show.command)
app.command("convert", cls=Verb)(convert.command)
app.command("targets", cls=Verb)(targets.command)


def run(signals: Signals | None = None) -> None:
    """Run the command line of this process and exit with its code. `signals`: those whose handlers are installed."""
    if signals is not None:
        signals.working = True
        code = guarded(lambda: app(prog_name="fxquant"), signals)
        signals.working = False
        if signals.received:
            leave(code)
        sys.exit(code)
    with Signals() as own:
        sys.exit(guarded(lambda: app(prog_name="fxquant"), own))
