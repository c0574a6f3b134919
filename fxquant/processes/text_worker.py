"""The process in which chat templates and tokenizers run: foreign code, under limits that the system enforces.

Run as a script, without fxquant; `fxquant.processes.bounded_worker` has the other end of the pipe. Each line of
standard input is a JSON request, each line of standard output its answer. A request that computes too long ends the
process by a signal; too much memory is a MemoryError, or ends it too.
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
    """Answer until the other end closes the pipe. What it opens is in the first request, with the limits of all."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that is printed may be an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the other end decides
    for alarm in (signal.SIGALRM, signal.SIGPROF):  # whoever started us may have ignored or blocked them
        signal.signal(alarm, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM, signal.SIGPROF))
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    answer: Answer | None = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if answer is None:
            import_module(LIBRARIES[request["open"]])  # which is not what time and memory are for
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
        except BaseException as error:  # whatever foreign code may raise; panics of Rust are no Exception
            written = json.dumps({"error": short(error)})
        _limit_time(0, 0)
        answers.write(written + "\n")
        answers.flush()


def _limit(kind: int, most: int) -> None:
    """For good; a limit that is lower already stays."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _limit_time(seconds: float, wall: float) -> None:
    """The system ends the process after so many seconds of computing, or by the clock; 0: no more."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, wall)


def open_template(request: dict[str, Any]) -> Answer:
    """As transformers compiles it, but without a clock: the same chat is the same text on any day."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    template = environment.from_string(request["source"])
    return lambda chat: template.render(**chat["variables"])


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    """Jinja's own would escape <, > and & for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


def open_tokenizer(request: dict[str, Any]) -> Answer:
    """A tokenizer.json, without what would change the length of a text or is drawn by chance."""
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
    """Its message on one line, of at most `LONGEST_FACT` characters."""
    text = " ".join((str(error) or type(error).__name__).split()).rstrip(".")
    return text if len(text) <= LONGEST_FACT else text[:LONGEST_FACT] + "…"


if __name__ == "__main__":
    main()
