"""JSON from untrusted files: regular files only, bounded in bytes, nesting and digits, valid UTF-8 throughout."""

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
    """Read a file of at most `largest` bytes and parse it with `parse_json`. Raises FxquantError for any fault."""
    return parse_json(read_bytes(path, largest, remedy), path, remedy, lenient)


def read_bytes(path: Path, largest: int, remedy: str = AGAIN) -> bytes:
    """The content of a file of at most `largest` bytes. Raises FxquantError if it is larger or cannot be read."""
    try:
        if not path.is_file():  # opening a pipe would block forever
            raise FxquantError(path, "not a regular file." if path.exists() else "is missing.", remedy)
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
    """The text of a UTF-8 file of at most `largest` bytes."""
    try:
        return read_bytes(path, largest, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FxquantError(path, f"not valid UTF-8 at byte {error.start}.", remedy) from None


def parse_json(
    data: bytes | str, place: object, remedy: str = AGAIN, lenient: bool = False, finite: bool = True
) -> Any:
    """Parse `data` as JSON; errors name `place`.

    Limits: `NESTING` levels, `NUMBER_DIGITS` characters per number, `VALUES` commas; every string must encode as UTF-8.
    Duplicate keys, NaN and infinities are errors, except: `lenient` accepts all of them (files of other tools, which
    Python alone reads); `finite=False` accepts NaN and infinities (documents that embed a part of such a file).
    """
    encoded = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    if (count := encoded.count(b",")) > VALUES:
        raise FxquantError(place, f"has {count:,} commas, at most {VALUES:,} are read.", remedy)
    hooks: dict[str, Any] = {}
    if b"0" * (NUMBER_DIGITS + 1) in encoded.translate(OF_NUMBERS):  # hooks are slow: only if needed
        hooks |= {"parse_int": _integer, "parse_float": _float}
    if not lenient:
        hooks |= {"object_pairs_hook": _unique} | ({"parse_constant": _refuse_constant} if finite else {})
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        text = text.removeprefix("\ufeff") if lenient else text  # byte order mark, written by Windows editors
        with uncollected():
            value = json.loads(text, **hooks)
        if not _shallow(encoded):  # walking the document is slow, counting brackets is not
            _check_nesting(value)
        if SURROGATE.search(text):  # such escapes may give strings that UTF-8 cannot encode
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise FxquantError(place, f"not valid UTF-8 at byte {error.start}.", remedy) from None
    except UnicodeEncodeError as error:
        raise FxquantError(place, f"contains a lone surrogate: {error.object[error.start]!a}.", remedy) from None
    except RecursionError:
        raise FxquantError(place, f"nested more than {NESTING} levels deep.", remedy) from None
    except ValueError as error:
        raise FxquantError(place, f"not JSON: {error}.", remedy) from None
    return value


def _shallow(text: bytes) -> bool:
    """Whether counting brackets proves that nesting is within the limit; brackets inside strings can make it False."""
    brackets = text.translate(None, BUT_BRACKETS)
    for _ in range(NESTING):
        if not brackets:
            return True
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return not brackets


def _check_nesting(value: Any) -> None:
    """Raises RecursionError for a document nested too deeply for recursive code."""
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
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {twice!r} in one object")
    return entries
