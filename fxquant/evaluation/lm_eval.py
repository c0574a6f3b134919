"""lm-eval adapter: the rewritten graph of an output folder as a model of lm-evaluation-harness. Needs extra `eval`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.evaluation.verbs import open_output
from fxquant.generation.generator import config_end_ids
from fxquant.generation.greedy import greedy
from fxquant.generation.text_stream import TextStream
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.runtime.program_runner import ProgramRunner
from fxquant.text.load import Encoder, bos_ids

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise FxquantError(
        "fxquant.evaluation.lm_eval", f"needs lm-eval: {error}.", "Run pip install 'fxquant[eval]'."
    ) from None

Pair = tuple[list[int], list[int]]
"""Token ids of a context, not empty, and of what follows it."""
MAX_NEW_TOKENS = 256


class FxquantLM(TemplateLM):
    """`FxquantLM("out")` is the `model` of `lm_eval.simple_evaluate`: greedy, on CPU, each text starting with BOS.

    batch_size  requests that run together, each weight read once for all of them
    max_length  positions of the model, by default max_position_embeddings; longer requests lose their beginning
    """

    def __init__(self, out: str | Path, batch_size: int = 8, max_length: int | None = None) -> None:
        super().__init__()
        self.out = Path(out)
        self.program, self.read = open_output(self.out)
        config = self.program.config
        self.encoder = Encoder(self.out, bos_ids(Checkpoint(self.out, config, {})))
        self.batch_size = int(batch_size)
        self.max_length = int(max_length or config.get("max_position_embeddings", 2048))

    @property
    def eot_token_id(self) -> int:
        """The first of the tokens that end a text."""
        return min(config_end_ids(self.program), default=self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text: BOS, or an end token if the model has no BOS."""
        first = self.encoder.bos or sorted(config_end_ids(self.program))
        if not first:
            raise FxquantError(self.out, "has neither bos_token_id nor eos_token_id.", "Add one to its config.json.")
        return first[0]

    @property
    def tokenizer_name(self) -> str:
        """Key of lm-eval's cache of requests."""
        return str(self.out.resolve()).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids without BOS: every scored or continued text gets it once."""
        return self.encoder.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Render the chat with the folder's template."""
        return self.encoder.template.render(chat_history, "a request", add_generation_prompt)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text; a longer one in windows of `max_length`, each token scored once."""
        windows = [self._windows(*request.args) for request in requests]
        scores = iter(self._scores([pair for text in windows for pair in text], disable_tqdm))
        totals = [sum(next(scores)[0] for _ in text) for text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text after each context, up to the first stop string, an end token or `max_gen_toks`."""
        texts = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generate"):
            context, options = request.args
            texts.append(self._continued(context, options))
            self.cache_hook.add_partial("generate_until", (context, options), texts[-1])
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **other: Any
    ) -> list[tuple[float, bool]]:
        scores = self._scores([(context, new) for _, context, new in requests], disable_tqdm)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def _scores(self, pairs: list[Pair], quiet: bool) -> list[tuple[float, bool]]:
        """log p of the text after each context, and whether greedy decoding gives the same text."""
        scores = []
        for start in tqdm(range(0, len(pairs), self.batch_size), disable=quiet, desc="score"):
            chunk = [self._row(*pair) for pair in pairs[start : start + self.batch_size]]
            inputs = [prefill_inputs(self.program, row[:, :-1]) for row, _ in chunk]
            outputs = execute(self.program, self.read, inputs)
            scores += [_score(row, new, logits) for (row, new), (logits, *_) in zip(chunk, outputs, strict=True)]
        return scores

    def _row(self, context: list[int], new: list[int]) -> tuple[Tensor, int]:
        """int64 [1, ≤ max_length + 1] of both, and how many of its last ids are new."""
        if len(new) > self.max_length:
            fact = f"{len(new)} tokens to score exceed {self.max_length} positions."
            raise FxquantError(self.out, fact, "Raise max_length, or choose a task with shorter texts.")
        bos = self.encoder.bos if context[:1] != self.encoder.bos else []
        # one more than max_length: the last id is only a target, and needs no position
        return torch.tensor([(bos + context + new)[-(self.max_length + 1) :]]), len(new)

    def _windows(self, text: str) -> list[Pair]:
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        return [make_disjoint_window(window) for window in windows]

    def _continued(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise FxquantError("generate_until", f"sampling is not supported: {options}.", "Use do_sample: false.")
        until = options.get("until") or []
        new = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
        room = self.max_length - new - len(self.encoder.bos)
        if room < 1:
            raise FxquantError("generate_until", f"max_gen_toks {new} of {self.max_length} positions.", "Lower it.")
        # without BOS an empty context would leave nothing to run on
        ids = self.encoder.bos + self.tok_encode(context)[-room:] or [self.prefix_token_id]
        steps = greedy(ProgramRunner(self.program, self.read), [ids], new, self.program.config["vocab_size"])
        stream = TextStream(self.encoder.tokenizer.decode, [until] if isinstance(until, str) else until)
        return _text(stream, steps, config_end_ids(self.program))


def _score(row: Tensor, new: int, logits: Tensor) -> tuple[float, bool]:
    targets = row[0, -new:] if new else row[0, :0]
    log_probabilities = logits[0, len(logits[0]) - new :].double().log_softmax(-1)
    return log_probabilities.gather(-1, targets[:, None]).sum().item(), bool(
        (log_probabilities.argmax(-1) == targets).all()
    )


def _text(stream: TextStream, steps: Iterable[Tensor], ends: set[int]) -> str:
    """Text of the best tokens, until an end token or a stop word."""
    for logits in steps:
        token = int(logits.argmax())
        if token in ends:
            break
        stream.feed(token)
        if stream.stop_word is not None:
            break
    stream.end()
    return stream.text
