"""Output that a page shows beside a command, compared with the real one.

A line `…` stands for any lines. Frames of tables and runs of spaces do not count. Integers must be equal; numbers with
a point may differ by a tenth, more than processors differ by; a 99th percentile by a third, since on the 1,020 tokens
of a page ten decide it, and one that another expert gets moves it (0.0229 and 0.0199 on two processors). Times, rates,
memory, and the largest float error of a check with its place are not compared.
"""

import re

FRAME = re.compile(r"[─━│┃┄┏┓┗┛┡┩├┤┼└┘┌┐┬┴╇╋┳┻┯┷┠┨╭╮╰╯]+")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
MEASURED = re.compile(r"\d[\d,]*(?:\.\d+)?(?: s| ms| min| h| GB/s| G/s)\b|\d[\d,.]* [kMG]B(?= of memory)")
LARGEST = re.compile(r"[\d.e+-]+ of (?:the bound|the largest value|[\d.e+-]+) at\b.*|^model\.layers\.\S+$")
RATES = ("prefill ", "decode batch ", "load ", "peak memory ", "of it by the graph ")
MEASURED_LINES = ("disk ", "compute ", "time ", "memory ", "last-bit noise ", "ONNX graph, end to end ", *RATES)
ANY = "…"
TAIL, REST = "99th percentile ", "top-1"
TOLERANCE, TAIL_TOLERANCE = 0.1, 1 / 3


def difference(shown: str, real: str) -> str:
    """Why `real` is not what a page shows; empty where it is."""
    lines = [line for line in map(_plain, real.splitlines()) if line]
    position, floating = 0, False
    for line in filter(None, map(_plain, shown.splitlines())):
        if line == ANY:
            floating = True
            continue
        if floating:
            position = next((at for at in range(position, len(lines)) if same(line, lines[at])), len(lines))
        if position == len(lines) or not same(line, lines[position]):
            return f"shown   {line}\nprinted {lines[position] if position < len(lines) else 'nothing more'}"
        position, floating = position + 1, False
    return "" if floating or position == len(lines) else f"printed too: {lines[position]}"


def same(shown: str, real: str) -> bool:
    """Whether two lines differ in nothing that counts."""
    if shown.startswith(MEASURED_LINES):
        return shown.split()[0] == real.split()[0]
    shown, real = (MEASURED.sub("", line) for line in (shown, real))
    return NUMBER.sub("#", shown) == NUMBER.sub("#", real) and all(
        _near(*pair, TAIL_TOLERANCE if TAIL in part else TOLERANCE)
        for part, other in zip(shown.partition(REST), real.partition(REST), strict=True)
        for pair in zip(NUMBER.findall(part), NUMBER.findall(other), strict=True)
    )


def _near(shown: str, real: str, tolerance: float) -> bool:
    if "." not in shown:
        return shown == real
    left, right = (float(text.replace(",", "")) for text in (shown, real))
    return abs(left - right) <= tolerance * max(abs(left), abs(right))


def _plain(line: str) -> str:
    return LARGEST.sub("", " ".join(FRAME.sub(" ", line).split())).strip()
