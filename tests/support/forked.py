"""Processes to kill, forked from one that has imported everything."""

import os
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkProcess


def forked(work: Callable[[], object]) -> ForkProcess:
    """Does `work` and ends, whatever this process would still do at its end."""

    def run() -> None:
        work()
        os._exit(0)

    process = get_context("fork").Process(target=run)
    process.start()
    return process
