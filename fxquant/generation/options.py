"""Options of text generation: what a user asks for, over what generation_config.json says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fxquant.errors import FxquantError
from fxquant.generation.generation_config import GenerationConfig
from fxquant.generation.sampling import Sampling

T = TypeVar("T")
MAX_NEW_TOKENS = 64
"""Where neither an option nor generation_config.json says how many."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What overrules generation_config.json; None: what the file says.

    max_new_tokens     of each text; by default 64 if the file does not say
    chat, system       prompts are what a user says, after this message, in the form of the chat template
    greedy             always the best token
    temperature, top_p, top_k  any of them means sampling, a temperature of 0 the best token
    seed               of the generator that each prompt has of its own
    stop               more texts that end a text
    batch_size         prompts that run together
    generation_config  whether the file is read
    threads            of ONNX Runtime; 0: one per core
    prepack            folder where its packed weights are kept; None: they are packed in memory at each load
    """

    max_new_tokens: int | None = None
    chat: bool = False
    system: str | None = None
    greedy: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    stop: Sequence[str] = ()
    batch_size: int = 8
    generation_config: bool = True
    threads: int = 0
    prepack: Path | None = None

    def __post_init__(self) -> None:
        given = {"--temperature": self.temperature, "--top-p": self.top_p, "--top-k": self.top_k}
        asked = [name for name, value in given.items() if value is not None]
        if self.greedy and asked:
            raise FxquantError("--greedy", f"contradicts {', '.join(asked)}.", "Leave out one of them.")
        if self.system is not None and not self.chat:
            raise FxquantError("--system", "only a chat has a system message.", "Add --chat.")
        if "" in self.stop:
            raise FxquantError("--stop", "is empty.", "Pass some text.")

    def sampling(self, config: GenerationConfig) -> Sampling:
        """What holds with that file."""
        penalty = 1.0 if config.repetition_penalty is None else config.repetition_penalty
        asked = any(value is not None for value in (self.temperature, self.top_p, self.top_k))
        if self.greedy or not (asked or config.do_sample):
            return Sampling(repetition_penalty=penalty, seed=self.seed)
        return Sampling(
            temperature=first(self.temperature, config.temperature, 1.0),
            top_k=max(first(self.top_k, config.top_k, 0), 0),
            top_p=first(self.top_p, config.top_p, 1.0),
            min_p=first(config.min_p, 0.0),
            repetition_penalty=penalty,
            seed=self.seed,
        )


def first(*values: T | None) -> T:
    """The first that is not None."""
    return next(value for value in values if value is not None)
