"""The `fxquant` command, and `python -m fxquant`."""

from fxquant.tools.signals import Signals


def run() -> None:
    """Handle Ctrl-C from before the slow imports until the process ends."""
    signals = Signals(working=False)
    signals.listen()
    from fxquant.tools.main import run as run_command

    run_command(signals)


if __name__ == "__main__":
    run()
