"""JSON from outside: regular files, bounded in bytes, nesting and digits, UTF-8 that can be written again."""

import json
import re
from pathlib import Path
from typing import Any

from fxquant.errors import FxquantError
from fxquant.gc_pause import uncollected
from fxquant.inputs.limits import NESTING, NUMBER_DIGITS, VALUES

AGAIN = "Copy the file again."
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
OF_NUMBERS = bytes(48 if chr(code) in "0123456789+-.eE" else 32 for code in range(256))
BUT_BRACKETS = bytes(code for code in range(256) if chr(code) not in "[]{}")


def read_json(path: Path, largest: int, remedy: str = AGAIN, lenient: bool = False) -> Any:
    """The document of a file of at most `largest` bytes, by `parse_json`. Raises FxquantError for all that is wrong."""
    return parse_json(read_bytes(path, largest, remedy), path, remedy, lenient)


def read_bytes(path: Path, largest: int, remedy: str = AGAIN) -> bytes:
    """A file of at most `largest` bytes. Raises FxquantError where it is larger or cannot be read."""
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise FxquantError(path, "no regular file." if path.exists() else "is missing.", remedy)
        with path.open("rb") as stream:
            data = stream.read(largest + 1)
    except OSError as error:
        raise FxquantError(path, f"cannot be read: {error.strerror}.", remedy) from None
    except ValueError as error:  # a name with a zero byte
        raise FxquantError(repr(str(path)), f"cannot be read: {error}.", remedy) from None
    if len(data) > largest:
        raise FxquantError(path, f"more than {largest:,} bytes.", remedy)
    return data


def read_text(path: Path, largest: int, remedy: str = AGAIN) -> str:
    """A UTF-8 file of at most `largest` bytes."""
    try:
        return read_bytes(path, largest, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FxquantError(path, f"not UTF-8: byte {error.start}.", remedy) from None


def parse_json(
    data: bytes | str, place: object, remedy: str = AGAIN, lenient: bool = False, finite: bool = True
) -> Any:
    """`data` as JSON; `place` is what an error names.

    Nesting is at most `NESTING`, numbers have at most `NUMBER_DIGITS` characters, commas are at most `VALUES`, and
    every string can be written as UTF-8. Unless `lenient`, as for files of other tools that only Python reads, keys
    are unique and numbers finite; without `finite`, keys are unique and NaN and infinities are read, as where a part
    comes from such a file.
    """
    encoded = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    if (count := encoded.count(b",")) > VALUES:
        raise FxquantError(place, f"has {count:,} commas, at most {VALUES:,} are read.", remedy)
    hooks: dict[str, Any] = {}
    if b"0" * (NUMBER_DIGITS + 1) in encoded.translate(OF_NUMBERS):  # else no number is long, and hooks cost time
        hooks |= {"parse_int": _integer, "parse_float": _float}
    if not lenient:
        hooks |= {"object_pairs_hook": _unique} | ({"parse_constant": _refuse_constant} if finite else {})
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        text = text.removeprefix("\ufeff") if lenient else text  # editors of Windows put it first
        with uncollected():
            value = json.loads(text, **hooks)
        if not _shallow(encoded):
            _check_nesting(value)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise FxquantError(place, f"not UTF-8: byte {error.start}.", remedy) from None
    except UnicodeEncodeError as error:
        raise FxquantError(place, f"has a lone surrogate: {error.object[error.start]!a}.", remedy) from None
    except RecursionError:
        raise FxquantError(place, f"nested more than {NESTING} deep.", remedy) from None
    except ValueError as error:
        raise FxquantError(place, f"not JSON: {error}.", remedy) from None
    return value


def _shallow(text: bytes) -> bool:
    """Whether brackets alone show that nothing is too deep; brackets in strings may hide it."""
    brackets = text.translate(None, BUT_BRACKETS)
    for _ in range(NESTING):
        if not brackets:
            return True
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return not brackets


def _check_nesting(value: Any) -> None:
    """Raises RecursionError for a document that a recursive reader might not come out of."""
    level = [value]
    for _ in range(NESTING):
        inner = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [child for items in inner if isinstance(items, list) for child in items if type(child) in (dict, list)]
        if not level:
            return
    raise RecursionError


def _integer(text: str) -> int:
    return int(_bounded(text))


def _float(text: str) -> float:
    return float(_bounded(text))


def _bounded(text: str) -> str:
    if len(text) > NUMBER_DIGITS:
        raise ValueError(f"a number of {len(text):,} characters, at most {NUMBER_DIGITS} are read")
    return text


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} twice in one object")
    return entries
