"""Processes to kill, forked from one that has imported everything."""

import os
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkProcess

import torch


def renew_threads() -> None:
    """In a process just forked, before it starts threads: torch makes its pool of threads anew at the first use.

    Two threads that both come first fall over each other: "Invalid thread pool!", in one of four processes.
    """
    torch.set_num_threads(1)


def forked(work: Callable[[], object]) -> ForkProcess:
    """Does `work` and ends, whatever this process would still do at its end."""

    def run() -> None:
        renew_threads()
        work()
        os._exit(0)

    process = get_context("fork").Process(target=run)
    process.start()
    return process
