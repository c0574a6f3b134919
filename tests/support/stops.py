"""Ends of a process at its N-th operation on a file: killed, or an error raised there."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from forked import renew_threads

OPERATIONS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "fsync", "ftruncate")
"""Of `os`; what changes names, or brings bytes to the disk."""


@contextmanager
def watched(act: Callable[[int, str], object], names: tuple[str, ...] = OPERATIONS) -> Iterator[list[str]]:
    """Call `act` with the number and the name of each operation, before it is done; what was done, in order."""
    done: list[str] = []

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            act(len(done), name)
            done.append(name)
            return original(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield done


def killed_at(count: int, work: Callable[[], object]) -> bool:
    """Have a child do `work` and end, as SIGKILL would, before its operation `count`; whether it came so far."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            renew_threads()
            with watched(lambda number, name: os._exit(9) if number == count else None):
                work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    return status == 9


def raising_at(count: int, error: BaseException) -> Callable[[int, str], None]:
    """For `watched`: an error in place of operation `count`, once."""
    raised: list[int] = []

    def act(number: int, name: str) -> None:
        if number == count and not raised:
            raised.append(number)
            raise error

    return act
