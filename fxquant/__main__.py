"""The `fxquant` command, and `python -m fxquant`."""

from fxquant.tools.signals import Signals


def run() -> None:
    """Listens to Ctrl-C before anything that takes time to import is imported, and until the process is gone."""
    signals = Signals(working=False)
    signals.listen()
    from fxquant.tools.main import run as run_command

    run_command(signals)


if __name__ == "__main__":
    run()
