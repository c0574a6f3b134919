"""A Ray cluster on this machine alone, for the time of one command.

Ray starts its daemons in the process group of the driver, where a signal to the group, such as Ctrl-C in a terminal or
the stop of a service, reaches them too: a driver whose raylet is gone loses its tasks, or exits at once. Here they
belong to a process in a session of its own, and end with the command whatever ends it.
"""

import os
import secrets
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from fxquant.processes.command import drained, last_line, supervised

MODE, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
LONGEST = 4096
"""Bytes of an address."""
START_SECONDS = 120
"""Ray itself gives its daemons 30 seconds each."""
HEAD = """
import os, signal, sys
import ray
handle, cores = int(sys.argv[1]), int(sys.argv[2])
context = ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=50)
os.write(handle, context.address_info["address"].encode())
os.close(handle)
signal.pause()
"""
"""Program of the process that holds the cluster; its arguments: a file descriptor for the address, and cores."""


@contextmanager
def own_token() -> Iterator[None]:
    """Clusters that start while the block is open answer to this process alone, by a token that nobody else knows.

    A mode that the user set stays. Afterwards environment and Ray are as before: later clusters are no part of this.
    """
    if MODE in os.environ:
        yield
        return
    before = os.environ.get(TOKEN)
    os.environ.update({MODE: "token", TOKEN: secrets.token_hex(32)})
    _read_again()
    try:
        yield
    finally:
        os.environ.pop(MODE, None)
        os.environ.pop(TOKEN, None)
        os.environ.update({} if before is None else {TOKEN: before})
        _read_again()


def _read_again() -> None:
    """Have Ray look at the environment: it keeps the mode from its import, and the token from its first use."""
    native = import_module("ray._raylet")
    if hasattr(native, "AuthenticationTokenLoader"):  # else a release without tokens
        native.Config.initialize("")  # first: threads that still run must not look for a token that is gone
        native.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def own_cluster(cores: int) -> Iterator[str]:
    """The address of a cluster of `cores` cores, there while the block is open. Raises OSError if it does not start."""
    reading, writing = os.pipe()
    tail = bytearray()
    try:
        with supervised([sys.executable, "-c", HEAD, str(writing), str(cores)], (writing,)) as process:
            os.close(writing)
            thread = drained(process.stdout, tail)
            ready, _, _ = select.select([reading], [], [], START_SECONDS)
            address = os.read(reading, LONGEST).decode() if ready else ""  # "" too when the process has ended
            if not address:
                thread.join(1.0 if ready else 0.0)
                reason = last_line(tail) if ready else f"it does not start in {START_SECONDS} seconds"
                raise OSError(reason)
            yield address
    finally:
        os.close(reading)
