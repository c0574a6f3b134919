"""What a piece of code makes Python run: generated code of torch.fx, shells and processes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SEEN: list[list[str]] = []
"""Where events go: one list for each `watched` that is open."""
GENERATED = "<eval_with_key>"
"""How torch.fx names the source that it generates and executes."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not SEEN:
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"):
        SEEN[-1].append(f"{event} {arguments}")
    elif event == "exec" and getattr(arguments[0], "co_filename", "").startswith(GENERATED):
        SEEN[-1].append(f"generated code {arguments[0].co_filename}")
    elif event == "compile" and str(arguments[1]).startswith(GENERATED):
        SEEN[-1].append(f"generated text {arguments[1]}")


sys.addaudithook(_hook)  # for good: Python has no way to take one away


@contextmanager
def watched() -> Iterator[list[str]]:
    """The list of what is run meanwhile: it must stay empty where a graph file is read."""
    SEEN.append([])
    try:
        yield SEEN[-1]
    finally:
        SEEN.pop()
