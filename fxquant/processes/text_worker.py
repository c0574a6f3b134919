"""Sandbox process for chat templates and tokenizers: untrusted code under limits that the kernel enforces.

Runs as a script, without importing fxquant; `fxquant.processes.bounded_worker` holds the other end of the pipe. Each
line of stdin is a JSON request, each line of stdout its answer. A request that exceeds its CPU time is killed by a
signal; exceeding the memory limit raises MemoryError or kills the process.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

LONGEST_FACT = 200
LIBRARIES = {"template": "jinja2.sandbox", "tokenizer": "tokenizers"}
Answer = Callable[[dict[str, Any]], Any]


def main() -> None:
    """Answer requests until the pipe closes. The first request says what to open and sets the memory limit."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # prints of untrusted code must not reach the answer pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the parent decides
    for alarm in (signal.SIGALRM, signal.SIGPROF):  # ignored and blocked signals are inherited
        signal.signal(alarm, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM, signal.SIGPROF))
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    answer: Answer | None = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if answer is None:
            import_module(LIBRARIES[request["open"]])  # before the limits: import cost is not the document's fault
            for kind, most in (limits | {resource.RLIMIT_DATA: request["memory"]}).items():
                _limit(kind, most)
        _limit_time(request["seconds"], request["wall"])
        try:
            if answer is None:
                answer, text = {"template": open_template, "tokenizer": open_tokenizer}[request["open"]](request), ""
            else:
                text = answer(request)
            written = json.dumps({"answer": text})
        except MemoryError:
            written = json.dumps({"memory": True})
        except BaseException as error:  # Rust panics are not subclasses of Exception
            written = json.dumps({"error": short(error)})
        _limit_time(0, 0)
        answers.write(written + "\n")
        answers.flush()


def _limit(kind: int, most: int) -> None:
    """Lower soft and hard limit for good; a lower existing limit stays."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _limit_time(seconds: float, wall: float) -> None:
    """Have the kernel kill the process after `seconds` of CPU time or `wall` seconds; 0 disarms."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, wall)


def open_template(request: dict[str, Any]) -> Answer:
    """Compile as transformers does, but without `strftime_now`: a chat must give the same text on any day."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    template = environment.from_string(request["text"])
    return lambda chat: template.render(**chat["variables"])


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    """Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


def open_tokenizer(request: dict[str, Any]) -> Answer:
    """A tokenizer.json with padding, truncation and random BPE dropout switched off."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(Path(request["file"]).read_bytes())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None

    def answer(asked: dict[str, Any]) -> Any:
        if "text" in asked:
            return tokenizer.encode(asked["text"], add_special_tokens=False).ids
        return tokenizer.decode(asked["ids"])

    return answer


def short(error: BaseException) -> str:
    """The error message on one line, cut to `LONGEST_FACT` characters."""
    text = " ".join((str(error) or type(error).__name__).split()).rstrip(".")
    return text if len(text) <= LONGEST_FACT else text[:LONGEST_FACT] + "…"


if __name__ == "__main__":
    main()
