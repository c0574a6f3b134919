"""Text stream: the text of tokens as they come, whole characters at a time, cut at stop words."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4
"""Tokens of one character at most: UTF-8 has up to four bytes."""
WINDOW = 16
"""Tokens that are decoded again for the next; then a new window begins, so that a long text costs no more."""


class TextStream:
    """Tokens in, text out. What may be the beginning of a stop word, or of a character, is held back.

    decode       token ids → text
    stops        stop words: from one on nothing is given out
    stop_tokens  tokens without text of their own → the stop word that each is
    stop_word    the one that was found
    text         all that was given out
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        stop_tokens: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._decode, self._stops, self._stop_tokens = decode, [stop for stop in stops if stop], stop_tokens
        self._window: list[int] = []
        self._whole, self._shown, self._held = 0, "", ""
        self.stop_word: str | None = None
        self.text = ""

    def feed(self, token: int) -> str:
        """The text that is final with this token."""
        if token in self._stop_tokens:
            piece = self.end()
            self.stop_word = self.stop_word or self._stop_tokens[token]
            return piece
        self._window.append(token)
        text = whole = self._decode(self._window)
        if text.endswith(INCOMPLETE):
            if len(self._window) - self._whole < LONGEST_CHARACTER:
                return ""
            text = text.removesuffix(INCOMPLETE)  # these bytes are no character; the last may yet begin one
        new, self._shown = text[len(self._shown) :], text
        if not whole.endswith(INCOMPLETE):
            self._close_window()
        return self._given(new)

    def end(self) -> str:
        """The rest, an incomplete character as U+FFFD; nothing after a stop word."""
        if self.stop_word is not None:
            return ""
        rest = self._decode(self._window)[len(self._shown) :] if self._window else ""
        piece = self._given(rest)
        held, self._held, self._window = self._held, "", []
        self.text += held
        return piece + held

    def _close_window(self) -> None:
        """After a whole character: begin again with the tokens since the last one, if they have text."""
        before, self._whole = self._whole, len(self._window)
        if len(self._window) < WINDOW or not before:
            return
        recent = self._window[before:]
        shown = self._decode(recent)
        if shown and not shown.startswith(INCOMPLETE):
            self._window, self._whole, self._shown = recent, len(recent), shown

    def _given(self, new: str) -> str:
        """Of the held text and `new`, what is before a stop word and cannot begin one."""
        text = self._held + new
        found = [(text.index(stop), stop) for stop in self._stops if stop in text]
        if found:
            place, self.stop_word = min(found, key=lambda pair: pair[0])
            self._held = ""
        else:
            place = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            self._held = text[place:]
        self.text += text[:place]
        return text[:place]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
