"""Escaping of text from outside, so that a terminal only shows it."""

import re

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline, line separators, direction overrides, lone surrogates."""
SPELLED = {
    "→": "->", "─": "-", "‹": "<", "›": ">", "×": "x", "…": "...", "✓": "+", "✗": "x", "“": '"', "”": '"', "–": "-",
    "·": "*", "‖": "||", "≈": "~", "≥": ">=",
}  # fmt: skip
"""ASCII spelling of our own symbols, for encodings without them."""


def visible(text: str) -> str:
    """`text` with `\\x1b` and the like in place of what a terminal would act on. Lines stay lines."""
    return UNSAFE.sub(lambda match: escaped(match[0]), text)


def one_line(text: object) -> str:
    """A name: newlines and tabs are written out too."""
    return visible(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def escaped(character: str) -> str:
    """`\\x1b`, `\\u202e`"""
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def spelled(text: str, encoding: str) -> str:
    """`text` with our own symbols in ASCII if `encoding` lacks them; other characters are left to the stream."""
    if text.isascii() or _has(text, encoding):
        return text
    return "".join(
        SPELLED.get(character, character) if not _has(character, encoding) else character for character in text
    )


def _has(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
