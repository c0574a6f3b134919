"""What fxquant run prints: text as it is written, or a line of JSON for each prompt; rates and memory at the end."""

from collections.abc import Callable, Iterable
from typing import Any

from fxquant.generation.completion import Completion, Piece, Totals
from fxquant.generation.generator import TextGenerator
from fxquant.generation.prompts import Encoded
from fxquant.generation.sampling import Sampling
from fxquant.processes.memory import peak_bytes
from fxquant.progress import Reporter
from fxquant.tools.console import errors, print_json_line, print_line, print_piece, size
from fxquant.tools.stages import duration, rate

Event = Piece | Completion | Totals


def show(generator: TextGenerator, prompts: list[Encoded], report: Reporter, as_json: bool, quiet: bool) -> None:
    """Write what follows the prompts, and print it as it comes."""
    generator.runner  # noqa: B018  # loaded before anything is printed
    events = generator.write(prompts, report)
    totals = _objects(events, generator) if as_json else _texts(events, prompts)
    if totals and not quiet:
        for line in summary(totals, generator.sampling):
            print_line((line, "dim"), to=errors)


def _texts(events: Iterable[Event], prompts: list[Encoded]) -> Totals | None:
    """One text as it is written; several, which are written together, each under its place when it is complete."""
    if len(prompts) == 1:
        return _stream(events, prompts[0])

    def give(done: Completion) -> None:
        print_line((f"── {done.place}", "bold"))
        print_piece(f"{done.prompt}{done.text}\n")

    return _in_order(events, give)


def _stream(events: Iterable[Event], prompt: Encoded) -> Totals | None:
    totals = None
    print_piece(prompt.text)
    try:
        for event in events:
            if isinstance(event, Piece):
                print_piece(event.text)
            elif isinstance(event, Totals):
                totals = event
    finally:
        print_piece("\n")  # an interrupt leaves a whole line too
    return totals


def _objects(events: Iterable[Event], generator: TextGenerator) -> Totals | None:
    """A line for each prompt."""
    sampling = generator.sampling.as_json()
    return _in_order(events, lambda done: print_json_line(json_of(done, sampling, generator.load_seconds)))


def _in_order(events: Iterable[Event], give: Callable[[Completion], None]) -> Totals | None:
    """`give` each completion in the order of the prompts."""
    totals, waiting, following = None, dict[int, Completion](), 0
    try:
        for event in events:
            if isinstance(event, Completion):
                waiting[event.index] = event
            elif isinstance(event, Totals):
                totals = event
            while following in waiting:
                give(waiting.pop(following))
                following += 1
    finally:  # an interrupt loses no text that is complete
        for index in sorted(waiting):
            give(waiting[index])
    return totals


def json_of(done: Completion, sampling: dict[str, Any], load_seconds: float) -> dict[str, Any]:
    """All of a completion."""
    speed = (len(done.token_ids) - 1) / done.decode_seconds if done.decode_seconds else None
    more = {"load_seconds": load_seconds, "tokens_per_second": speed, "peak_bytes": peak_bytes()}
    return done.as_json() | more | {"sampling": sampling}


def summary(totals: Totals, sampling: Sampling) -> list[str]:
    """Rates and memory, a line each for prompts, new tokens and the machine."""
    counts = f"{totals.prompts} prompts, " if totals.prompts > 1 else ""
    prompt = f"{counts}{totals.prompt_tokens:,} prompt tokens in {duration(totals.prefill_seconds)}"
    new = f"{totals.new_tokens:,} new tokens in {duration(totals.decode_seconds)}"
    rates = [f", {rate(speed, 'tokens')}" if speed else "" for speed in (totals.prefill_rate, totals.decode_rate)]
    return [
        f"{prompt}{rates[0]}",
        f"{new}{rates[1]}, {described(sampling)}",
        f"loaded in {duration(totals.load_seconds)}, peak memory {size(totals.peak_bytes)}",
    ]


def described(sampling: Sampling) -> str:
    """`greedy`; `temperature 0.6, top_p 0.95, seed 0`"""
    parts = sampling.as_json()
    words = [] if parts.pop("greedy") is False else ["greedy"]
    return ", ".join(words + [f"{name} {value}" for name, value in parts.items()])
