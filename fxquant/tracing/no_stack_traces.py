"""Stack traces of exported nodes, left out: no graph of fxquant keeps them, and they take a third of some exports."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Where torch has the option; an older one records them."""
    config = getattr(fx, "config", None)
    before = getattr(config, "do_not_emit_stack_traces", None)
    if config is None or before is None:
        yield
        return
    config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before
