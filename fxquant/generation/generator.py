"""Text generator: a compiled folder, options and its generation_config.json to the text after prompts."""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.generation.batch import Clock, decode
from fxquant.generation.completion import Completion, Piece, Totals, Writing
from fxquant.generation.generation_config import FILE, GenerationConfig, read_generation_config
from fxquant.generation.options import MAX_NEW_TOKENS, GenerateOptions, first
from fxquant.generation.prompts import Encoded, Prompt, PromptEncoder
from fxquant.generation.runner import Runner, check_runnable, open_runner
from fxquant.generation.sampling import Sampler
from fxquant.generation.text_stream import TextStream
from fxquant.processes.memory import peak_bytes
from fxquant.program.program import Program
from fxquant.progress import Reporter, silent
from fxquant.runtime.weight_providers import Read
from fxquant.text.load import Encoder, bos_ids
from fxquant.text.tokenizer import BoundedTokenizer


def config_end_ids(program: Program) -> set[int]:
    """The tokens that end a text, as config.json says."""
    stop = program.config.get("eos_token_id")
    return {token for token in (stop if isinstance(stop, list) else [stop]) if isinstance(token, int)}


class TextGenerator:
    """Writes what follows prompts. Prompts are encoded before the graph is loaded, which the first text does.

    sampling  how tokens are chosen
    ends      tokens that end a text
    stops     texts that do, which are not given out
    context   positions of the model
    notes     what the user is to know of generation_config.json
    """

    def __init__(self, folder: Path, program: Program, read: Read, options: GenerateOptions) -> None:
        self._folder, self._program, self._read, self._options = folder, program, read, options
        self.config = read_generation_config(folder) if options.generation_config else GenerationConfig()
        self.sampling = options.sampling(self.config)
        self.ends = frozenset(first(self.config.end_ids, config_end_ids(program)))
        self.stops = list(dict.fromkeys([*options.stop, *self.config.stops]))
        self.context: int = program.config.get("max_position_embeddings", 1 << 20)
        unknown = self.config.unknown
        self.notes = [f"{folder / FILE}: nothing is known of {', '.join(unknown)}: not used"] if unknown else []
        self.load_seconds = 0.0

    def encode(self, prompts: Sequence[Prompt], report: Reporter = silent) -> list[Encoded]:
        """The ids of prompts. Raises FxquantError for one that has none, or is too long."""
        options = self._options
        checkpoint = Checkpoint(self._folder, self._program.config, {})
        encode = PromptEncoder(self._encoder, checkpoint, options.chat, options.system, self.context)
        if len(prompts) < 2:
            return [encode(prompt) for prompt in prompts]
        encoded = []
        with report("tokenize", len(prompts), "prompts") as advance:
            for prompt in prompts:
                encoded.append(encode(prompt))
                advance(1)
        return encoded

    def write(self, prompts: Sequence[Encoded], report: Reporter = silent) -> Iterator[Piece | Completion | Totals]:
        """Pieces of text and completions as they come, the totals last. A batch of prompts runs together."""
        runner, size = self.runner, self._options.batch_size
        rows = [self._writing(index, prompt) for index, prompt in enumerate(prompts)]
        prefill = decoded = 0.0
        with report("generate", sum(row.limit for row in rows), "tokens") as advance:
            for start in range(0, len(rows), size):
                clock = Clock()
                for row, text in decode(runner, rows[start : start + size], self._vocabulary, clock):
                    at = f"prompt {row.index + 1} of {len(rows)}"
                    advance(1 + (row.limit - len(row.new) if row.finished else 0), at=at)
                    if text:
                        yield Piece(row.index, text)
                    if row.finished:
                        yield row.completion(clock.prefill, clock.decode)
                prefill, decoded = prefill + clock.prefill, decoded + clock.decode
        new = sum(len(row.new) for row in rows)
        counts = (len(rows), sum(len(row.ids) for row in rows), new, new - len(rows))
        yield Totals(*counts, self.load_seconds, prefill, decoded, peak_bytes())

    @cached_property
    def runner(self) -> Runner:
        """The graph, loaded on first use."""
        check_runnable(self._folder, self._program)
        began = time.perf_counter()
        options = self._options
        runner = open_runner(self._folder, self._program, self._read, options.threads, options.prepack)
        self.load_seconds = time.perf_counter() - began
        return runner

    def _writing(self, index: int, prompt: Encoded) -> Writing:
        options, config = self._options, self.config
        room = self.context - len(prompt.ids)
        whole = None if config.max_length is None else max(config.max_length - len(prompt.ids), 1)
        limit = min(first(options.max_new_tokens, config.max_new_tokens, whole, MAX_NEW_TOKENS), room)
        stream = TextStream(self._tokenizer.decode, self.stops, self._stop_tokens)
        return Writing(index, prompt, limit, self.ends, Sampler(self.sampling, prompt.ids), stream)

    @property
    def _vocabulary(self) -> int:
        size: int = self._program.config["vocab_size"]
        return size

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._folder, bos_ids(Checkpoint(self._folder, self._program.config, {})))

    @property
    def _tokenizer(self) -> BoundedTokenizer:
        return self._encoder.tokenizer

    @cached_property
    def _stop_tokens(self) -> dict[int, str]:
        """Stop words that are one special token, which has no text of its own."""
        encoded = {stop: self._tokenizer.encode(stop) for stop in self.stops}
        single = {ids[0]: stop for stop, ids in encoded.items() if len(ids) == 1}
        return {token: stop for token, stop in single.items() if not self._tokenizer.decode([token])}
