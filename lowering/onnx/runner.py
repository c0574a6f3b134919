"""Run an emitted model with onnxruntime on CPU."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from fxquant.errors import FxquantError

FILE = "model.onnx"


def session_options(threads: int = 0) -> onnxruntime.SessionOptions:
    """Options of every session here. `threads` 0: one a core.

    x64quantprecision matters on x86 without VNNI alone, where u8 x s8 products would saturate pairs of int16.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


class OnnxRunner:
    """The `model.onnx` of a folder, its weight files beside it."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        path = folder / FILE
        if not path.is_file():
            raise FxquantError(path, "no such file.", "Compile with --target onnx.")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), session_options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise FxquantError(path, f"onnxruntime {onnxruntime.__version__} does not load it: {error}") from error
        inputs = self._session.get_inputs()
        self._names = [one.name for one in inputs]
        self._widths = [one.shape[2] for one in inputs[3:]]

    def __call__(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """ids, positions int64 [B, S]; mask int64 [B, T]; past: a float32 latent [B, T - S, width] a layer.

        → logits float32 [B, S, vocabulary], the latents [B, T, width].
        """
        feeds = zip(self._names, (ids, mask, positions, *past), strict=True)
        results = self._session.run(None, {name: np.ascontiguousarray(value.numpy()) for name, value in feeds})
        logits, *presents = (torch.from_numpy(result) for result in results)
        return logits, presents

    def empty_cache(self, batch: int) -> list[Tensor]:
        """`past` of a first call."""
        return [torch.zeros(batch, 0, width) for width in self._widths]

    def prefill(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and caches of unpadded `ids` int64 [batch, length]."""
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        return self(ids, torch.ones_like(ids), positions, self.empty_cache(len(ids)))

    def generate(self, prompt: list[int], steps: int) -> Iterator[Tensor]:
        """Greedy decoding with the latent cache: yields the logits float32 [vocabulary] of each step."""
        if steps < 1:
            return
        logits, caches = self.prefill(torch.tensor([prompt]))
        yield logits[0, -1]
        for position in range(len(prompt), len(prompt) + steps - 1):
            token = logits[0, -1].argmax().view(1, 1)
            mask = torch.ones(1, position + 1, dtype=torch.int64)
            logits, caches = self(token, mask, torch.full((1, 1), position), caches)
            yield logits[0, -1]
