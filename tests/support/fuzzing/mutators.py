"""Valid bytes in, damaged bytes out: each mutator knows one format, and all damage plain bytes now and then."""

import copy
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from fuzzing.hostile import CODE, RAW, TEXTS, VALUES

Mutator = Callable[[Random], bytes]
Path = tuple[str | int, ...]
MARK = "@raw@{}@"
TWICE = "@twice@"
BYTES_EVERY = 5
"""One case in so many is damaged as bytes too."""


def damage(data: bytes, random: Random) -> bytes:
    """One to three of: flip, cut, insert, repeat, overwrite, splice."""
    for _ in range(random.choice((1, 1, 2, 3))):
        start = random.randrange(len(data) + 1)
        length = random.choice((1, 1, 2, 4, 8, 64, 512))
        kind = random.randrange(6)
        if kind == 0 and start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << random.randrange(8)]) + data[start + 1 :]
        elif kind == 1:
            data = data[:start] if random.random() < 0.5 else data[:start] + data[start + length :]
        elif kind == 2:
            data = data[:start] + random.randbytes(length) + data[start:]
        elif kind == 3:
            data = data[:start] + data[start : start + length] * random.choice((2, 3, 50)) + data[start + length :]
        elif kind == 4:
            data = data[:start] + random.choice((b"\x00", b"\xff", b'"', b"{", b"9")) * length + data[start + length :]
        else:
            other = random.randrange(len(data) + 1)
            data = data[:start] + data[other : other + length] + data[start:]
    return data


def paths(document: Any, path: Path = ()) -> Iterator[Path]:
    """The place of every value in a document, itself first."""
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from paths(value, (*path, key))


def value_at(document: Any, path: Path) -> Any:
    """What lies at a place, or raises LookupError or TypeError where an earlier mutation took it away."""
    for key in path:
        document = document[key]
    return document


@dataclass
class JsonMutator:
    """Replaces, deletes, doubles, renames and nests values of a document; its text gets what JSON cannot say."""

    data: bytes
    places: list[Path] = field(init=False)
    shallow: list[Path] = field(init=False)
    document: Any = field(init=False)

    def __post_init__(self) -> None:
        self.document = json.loads(self.data)
        self.places = list(paths(self.document))
        self.shallow = [path for path in self.places if len(path) <= 2]

    def __call__(self, random: Random) -> bytes:
        if random.randrange(BYTES_EVERY) == 0:
            return damage(self.data, random)
        return self.text(random).encode("utf-8", "surrogatepass")

    def text(self, random: Random) -> str:
        """The mutated document as text."""
        holder, raws = [json.loads(self.data)], [""]
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            try:
                self._change(holder, (0, *random.choice(random.choice((self.places, self.shallow)))), random, raws)
            except (LookupError, TypeError):
                continue  # an earlier change took the place away
        text = json.dumps(holder[0], ensure_ascii=random.random() < 0.2)
        for index, raw in enumerate(raws[1:], 1):
            text = text.replace(json.dumps(MARK.format(index)), raw)
        return text.replace(TWICE, "")

    def _change(self, holder: list, path: Path, random: Random, raws: list[str]) -> None:
        parent, key = value_at(holder, path[:-1]), path[-1]
        kind = random.randrange(12)
        if kind < 4:
            parent[key] = self._value(random, raws)
        elif kind == 4:
            parent[key] = _near(parent[key], random)
        elif kind == 5 and len(path) > 1:
            del parent[key]
        elif kind == 6 and isinstance(parent, list):
            parent.insert(random.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
        elif kind == 7 and isinstance(parent, dict):
            new = random.choice((*TEXTS, *CODE, *map(str, parent), f"{key}{TWICE}"))
            parent[new] = parent[key] if random.random() < 0.5 else parent.pop(key)
        elif kind == 8:
            parent[key] = [parent[key]] if random.random() < 0.5 else {"map": parent[key]}
        elif kind == 9:
            parent[key] = copy.deepcopy(value_at(self.document, random.choice(self.places)))
        elif kind == 10 and isinstance(parent, list):
            random.shuffle(parent)
        else:
            raws.append(random.choice(RAW))
            parent[key] = MARK.format(len(raws) - 1)

    def _value(self, random: Random, raws: list[str]) -> Any:
        return copy.deepcopy(random.choice(random.choice((CODE, TEXTS, VALUES, VALUES))))


def _near(value: Any, random: Random) -> Any:
    """A value that might pass for the right one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice(
            (value + 1, value - 1, -value, value * 2, value // 2, value * 10**6, value ^ 1 << 62, float(value))
        )
    if isinstance(value, float):
        return random.choice((-value, value * 1e10, value + 1, int(value) if abs(value) < 1e300 else 0))
    if isinstance(value, str):
        cut = random.randrange(len(value) + 1)
        return random.choice(
            (value[:cut], value + "x", value + "\n", value.upper(), value[:cut] + "." + value[cut:], value * 2)
        )
    return [] if isinstance(value, list) else {} if isinstance(value, dict) else 0


@dataclass
class LinesMutator:
    """One line of a file of JSON lines is mutated, and lines are lost, doubled and moved."""

    data: bytes

    def __post_init__(self) -> None:
        self.lines = self.data.splitlines(keepends=True)
        self.mutators = [JsonMutator(line) for line in self.lines]

    def __call__(self, random: Random) -> bytes:
        lines = list(self.lines)
        index = random.randrange(len(lines))
        kind = random.randrange(8)
        if kind == 0:
            return damage(self.data, random)
        if kind == 1:
            random.shuffle(lines)
        elif kind == 2:
            del lines[index]
        else:
            lines[index] = self.mutators[index](random) + (b"\n" if kind < 7 else b"")
        return b"".join(lines)


@dataclass
class SafetensorsMutator:
    """The header is mutated as JSON, with the length before it right or wrong; or bytes anywhere."""

    data: bytes

    def __post_init__(self) -> None:
        (length,) = struct.unpack("<Q", self.data[:8])
        header = self.data[8 : 8 + length]
        self.header, self.rest = JsonMutator(header.strip()), self.data[8 + length :]

    def __call__(self, random: Random) -> bytes:
        kind = random.randrange(10)
        if kind == 0:
            return damage(self.data, random)
        header, rest = self.header(random), self.rest
        length = len(header)
        if kind == 1:
            length = random.choice((0, 1, length + 1, length - 1, 2**63, 2**64 - 1, 10**8, len(header) + len(rest)))
        if kind == 2:
            rest = damage(rest, random)
        return struct.pack("<Q", max(length, 0)) + header + rest


@dataclass
class TextMutator:
    """Pieces of hostile text at the places of a text, and lines of it lost, doubled and moved."""

    data: bytes
    pieces: tuple[str, ...]

    def __call__(self, random: Random) -> bytes:
        if random.randrange(BYTES_EVERY) == 0:
            return damage(self.data, random)
        text = self.data.decode()
        for _ in range(random.choice((1, 1, 2, 3))):
            lines = text.split("\n")
            index, kind = random.randrange(len(lines)), random.randrange(6)
            if kind == 0:
                lines.insert(random.randrange(len(lines) + 1), lines.pop(index))
            elif kind == 1:
                lines.insert(index, lines[index])
            elif kind == 2 and ":" in lines[index]:
                lines[index] = f"{lines[index].split(':')[0]}: {random.choice((*self.pieces, *TEXTS))}"
            else:
                place = random.randrange(len(lines[index]) + 1)
                lines[index] = lines[index][:place] + random.choice((*self.pieces, *CODE)) + lines[index][place:]
            text = "\n".join(lines)
        return text.encode("utf-8", "surrogatepass")


@dataclass
class NpyMutator:
    """The header of a .npy is written anew with other words, or bytes are damaged."""

    data: bytes

    def __call__(self, random: Random) -> bytes:
        if random.randrange(3) == 0:
            return damage(self.data, random)
        order = random.choice(
            ("'<i8'", "'<i4'", "'|O'", "'<f8'", "'<U9'", "[('a','<i8')]", "'<M8[s]'", "'x'", "8", "'>i8'")
        )
        shape = random.choice(
            (
                "(2, 4)",
                "(4, 2)",
                "(8,)",
                "()",
                "(2, 4, 1)",
                "(0, 4)",
                "(10**9, 10**9)",
                "(1000000000, 100000)",
                "(-1, 4)",
                "(2, 4, 99999999999999999999)",
                "(" * 90 + ")" * 90,
                "[2, 4]",
                "(2.0, 4)",
                "(True, 8)",
                "(2**62, 2)",
                "x",
            )
        )
        header = (
            f"{{'descr': {order}, 'fortran_order': {random.choice(('False', 'True', '0', 'x'))}, 'shape': {shape}, }}"
        )
        header = random.choice((header, header, header.replace("}", ", 'x': 1}"), "[" * 300, header * 2, "1" * 70_000))
        packed = header.encode() + b"\n"
        version = random.choice((1, 1, 1, 2, 3, 0, 9))
        length = random.choice((len(packed), len(packed), len(packed) + 5, 2**16 - 1))
        prefix = struct.pack("<H", length % 2**16) if version == 1 else struct.pack("<I", length)
        magic = random.choice((b"\x93NUMPY",) * 5 + (b"PK\x03\x04", b"\x80\x04."))
        return magic + bytes([version, 0]) + prefix + packed + self.data[-64:]
