"""Text from outside, made so that a terminal only shows it."""

import re

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, separators of lines, overrides of the direction, halves of characters."""
SPELLED = {
    "→": "->", "─": "-", "‹": "<", "›": ">", "×": "x", "…": "...", "✓": "+", "✗": "x", "“": '"', "”": '"', "–": "-",
    "·": "*", "‖": "||", "≈": "~", "≥": ">=",
}  # fmt: skip
"""How signs of our own are written where the encoding has none."""


def visible(text: str) -> str:
    """`text` with `\\x1b` and the like in place of what a terminal would act on. Lines stay lines."""
    return UNSAFE.sub(lambda found: escaped(found[0]), text)


def one_line(text: object) -> str:
    """A name: newlines and tabs are written out too."""
    return visible(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def escaped(character: str) -> str:
    """`\\x1b`, `\\u202e`"""
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def spelled(text: str, encoding: str) -> str:
    """`text` with our own signs spelled where `encoding` has none; others are left to the stream."""
    if text.isascii() or _has(text, encoding):
        return text
    return "".join(SPELLED.get(one, one) if not _has(one, encoding) else one for one in text)


def _has(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
