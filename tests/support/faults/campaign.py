"""Many rounds: operations and faults spread over every scenario, in processes forked from one that imported all."""

import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from faults.operations import READS, SPACE, WRITES, Fault
from faults.rounds import OPERATIONS, Result, command, play
from faults.scenarios import Scenario, prepare, write_template

Round = tuple[Scenario, Fault, int]


def prepared(selected: Sequence[Scenario], base: Path) -> list[Scenario]:
    """The scenarios with what they start from and their references, under `base`."""
    template = write_template(base / "template")
    for number, scenario in enumerate(selected):
        prepare(scenario, template, base / f"scenario-{number}", _undisturbed)
    return list(selected)


def _undisturbed(folder: Path, arguments: tuple[str, ...]) -> list[str]:
    ended = command(folder, arguments)
    if ended.code:
        raise AssertionError(f"{' '.join(arguments)}: exit {ended.code}: {ended.text}")
    return (folder / OPERATIONS).read_text().splitlines()


def plan(scenario: Scenario, rounds: int) -> list[Round]:
    """So many of its operations under each fault that fits them: every kind of operation first, then evenly."""
    queues = {fault: _places(scenario.operations, fault) for fault in Fault}
    planned: list[Round] = []
    while len(planned) < rounds and queues:
        for fault in list(queues):
            at = next(queues[fault], None)
            if at is None:
                del queues[fault]
            elif len(planned) < rounds:
                planned.append((scenario, fault, at))
    return planned


def _places(operations: list[str], fault: Fault) -> Iterator[int]:
    """Numbers of operations that can meet the fault, in an order whose every beginning is spread."""
    kinds = {Fault.SHORT: READS + WRITES, Fault.FULL: SPACE}.get(fault)
    places = [number for number, kind in enumerate(operations) if kinds is None or kind in kinds]
    last = {operations[number]: number for number in places}
    yield from last.values()
    seen = set(last.values())
    step = 1
    while step < 2 * len(places):
        for part in range(1, step, 2) if step > 1 else (0,):
            number = places[part * len(places) // step]
            if number not in seen:
                seen.add(number)
                yield number
        step *= 2


def run_rounds(rounds: Sequence[Round], base: Path, jobs: int) -> list[Result]:
    """All of them, dealt out to `jobs` processes."""
    parts = [list(rounds[part::jobs]) for part in range(jobs)]
    files = [base / f"results-{part}.jsonl" for part in range(jobs)]
    children = []
    for part, file in zip(parts, files, strict=True):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _worker(part, file, base)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [Result(**{**line, "fault": Fault(line["fault"])}) for line in lines]


def _worker(rounds: Sequence[Round], file: Path, base: Path) -> None:
    status = 1
    try:
        with file.open("w") as stream:
            for scenario, fault, at in rounds:
                folder = base / f"round-{os.getpid()}" / "x"
                result = play(scenario, fault, at, folder)
                stream.write(json.dumps(asdict(result)) + "\n")
                stream.flush()
                shutil.rmtree(folder.parent, ignore_errors=True)
        status = 0
    finally:
        os._exit(status)


def table(results: Sequence[Result]) -> str:
    """Markdown: a line a scenario and fault, and their sum."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.scenario, result.fault].append(result)
    head = ("command", "fault", "rounds", "no output", "old output", "new output", "right after the rerun", "wrong")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [_line(name, fault, group) for (name, fault), group in groups.items()]
    return "\n".join([*lines, _line("**all**", "", list(results))])


def _line(name: str, fault: str, group: list[Result]) -> str:
    after = Counter(result.after for result in group)
    counts = [len(group), after["absent"], after["old"], after["new"], sum(result.again == "new" for result in group)]
    wrong = sum(bool(result.wrong) for result in group)
    return f"| {name} | {fault} | " + " | ".join(map(str, counts)) + f" | {wrong} |"
