"""The `fxquant` command."""

import sys

import typer

from fxquant.errors import FxquantError
from fxquant.tools import compare, compile_model, convert, evaluate, generate, plan, show, targets, verify
from fxquant.tools.console import errors, show_error

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended: 128 + SIGINT."""
app = typer.Typer(
    name="fxquant",
    help="Compile quantized DeepSeek-V3/R1 models: a torch.fx graph in, Ascend weights and graphs or ONNX out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _main(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        import fxquant

        typer.echo(fxquant.__version__)
        raise typer.Exit


app.command("compile")(compile_model.command)
app.command("plan")(plan.command)
app.command("verify")(verify.command)
app.command("run")(generate.command)
app.command("eval")(evaluate.command)
app.command("compare")(compare.command)
app.command("show")(show.command)
app.command("convert")(convert.command)
app.command("targets")(targets.command)


def run() -> None:
    """Entry point: errors of the user's input end in one screen and exit code 1."""
    try:
        app()
    except FxquantError as error:
        show_error(error)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        errors.print(
            "interrupted: nothing was left under the final name. The same command goes on where it was.", soft_wrap=True
        )
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(141)
