"""Completion: the text after one prompt, why it ended, and how long it took; pieces of it while it is written."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxquant.generation.prompts import Encoded
from fxquant.generation.sampling import Sampler
from fxquant.generation.text_stream import TextStream

STOP, LENGTH, STOP_WORD = "stop", "length", "stop_word"
"""Why a text ended: an end token, its limit or the model's context, a stop word."""


@dataclass(frozen=True)
class Piece:
    """More text of the prompt with that index; pieces of several prompts come in turn."""

    index: int
    text: str


@dataclass(frozen=True)
class Completion:
    """What follows one prompt.

    index            of the prompt
    place, prompt    where it stands, and its text; "" for a chat and for token ids
    text             without the end token and without the stop word
    token_ids        all tokens that were generated, an end token included
    finish_reason    "stop", "length" or "stop_word"
    prefill_seconds  of the prompts of its batch together
    decode_seconds   from the first token of its batch to its own last
    """

    index: int
    place: str
    prompt: str
    prompt_tokens: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_word: str | None
    prefill_seconds: float
    decode_seconds: float

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return dict(vars(self))


@dataclass(frozen=True)
class Totals:
    """Tokens and seconds of all prompts. The first token of a text comes with its prompt and is not decoded.

    peak_bytes  resident memory of this process at its largest
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    decoded_tokens: int
    load_seconds: float
    prefill_seconds: float
    decode_seconds: float
    peak_bytes: int

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens a second, of all rows of a batch together."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return dict(vars(self)) | {"prefill_rate": self.prefill_rate, "decode_rate": self.decode_rate}


class Writing:
    """A text being written: the row of a batch."""

    def __init__(
        self,
        index: int,
        prompt: Encoded,
        limit: int,
        ends: frozenset[int],
        sampler: Sampler,
        stream: TextStream,
    ) -> None:
        self.index, self.prompt, self.ids = index, prompt, prompt.ids
        self.limit, self.new = limit, list[int]()
        self._ends, self._sampler, self._stream = ends, sampler, stream
        self.reason = ""

    @property
    def finished(self) -> bool:
        """Whether nothing follows."""
        return bool(self.reason)

    def take(self, logits: Tensor) -> tuple[int, str]:
        """The token chosen from float [vocabulary], and the text that is final with it."""
        token = self._sampler.pick(logits)
        self.new.append(token)
        if token in self._ends:
            text = self._stream.end()
            self.reason = STOP if self._stream.stop_word is None else STOP_WORD
            return token, text
        text = self._stream.feed(token)
        if self._stream.stop_word is None and len(self.new) == self.limit:
            text += self._stream.end()
            self.reason = LENGTH
        if self._stream.stop_word is not None:
            self.reason = STOP_WORD
        return token, text

    def completion(self, prefill_seconds: float, decode_seconds: float) -> Completion:
        """As it stands."""
        stop_word, prompt = self._stream.stop_word, self.prompt
        text = (self._stream.text, self.new, self.reason, stop_word)
        return Completion(self.index, prompt.place, prompt.text, len(self.ids), *text, prefill_seconds, decode_seconds)
