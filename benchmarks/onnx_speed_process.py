"""One row of onnx_speed.py, in a process of its own: loads it, times it, and hands back what it measured as JSON."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fxquant.processes.memory import peak_bytes, resident_bytes

CALLS = {
    "prefill 128": (1, 128, 0),
    "prefill 512": (1, 512, 0),
    "decode": (1, 1, 128),
    "decode, 8 rows": (8, 1, 128),
    "decode, 1024 past": (1, 1, 1024),
    "decode, 8 rows, 1024 past": (8, 1, 1024),
}
"""Name → rows, new tokens and tokens before them."""
IDS = 1000
"""Random token ids are smaller."""
WARM = 2
"""Calls before the first that counts."""
SECONDS = 0.5
"""A call is repeated for so long, and as often as asked."""


@dataclass(frozen=True)
class Row:
    """way     key of WAYS
    folder  what it loads; its size on the disk is that of the files that `weights` match
    dtype   of transformers
    """

    way: str
    folder: Path
    dtype: str = "float32"
    weights: tuple[str, ...] = ("model.onnx*", "*.safetensors")

    def as_json(self) -> str:
        """For the command line of this file."""
        return json.dumps(asdict(self) | {"folder": str(self.folder)})

    @property
    def bytes(self) -> int:
        """On the disk."""
        return sum(file.stat().st_size for pattern in self.weights for file in self.folder.glob(pattern))


class Subject(Protocol):
    """A model that is loaded."""

    def logits(self, ids: Tensor) -> Tensor:
        """ids int64 [1, S] → float32 [1, S, vocabulary]."""

    def call(self, rows: int, new: int, past: int) -> Callable[[], Any]:
        """What is timed: `new` tokens of `rows` after `past` others; it may be called again and again."""


class Onnx:
    """A folder's model.onnx, by ONNX Runtime."""

    def __init__(self, row: Row) -> None:
        from fxquant.lowering.onnx.runner import OnnxRunner

        self._runner = OnnxRunner(row.folder, threads=1)

    def logits(self, ids: Tensor) -> Tensor:
        return self._runner.prefill(ids)[0]

    def call(self, rows: int, new: int, past: int) -> Callable[[], Any]:
        shapes = zip(self._runner.empty_cache(rows), self._runner.past_axes, strict=True)
        caches = [_random_cache(empty, axis, past) for empty, axis in shapes]
        positions = torch.arange(past, past + new).expand(rows, new)
        inputs = _ids(rows, new), torch.ones(rows, past + new, dtype=torch.int64), positions, caches
        return lambda: self._runner(*inputs)


class OpenVino:
    """The same by OpenVINO, whose local functions are inlined."""

    def __init__(self, row: Row) -> None:
        import openvino

        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        self._model = openvino.Core().compile_model(str(row.folder / "model.onnx"), "CPU", hints)
        self._widths = [port.partial_shape[2].get_length() for port in self._model.inputs[3:]]

    def logits(self, ids: Tensor) -> Tensor:
        feeds = self._feeds(ids, 0)
        return torch.from_numpy(np.array(self._model(feeds)[self._model.output("logits")]))

    def call(self, rows: int, new: int, past: int) -> Callable[[], Any]:
        feeds = self._feeds(_ids(rows, new), past)
        return lambda: self._model(feeds)

    def _feeds(self, ids: Tensor, past: int) -> list[np.ndarray]:
        rows, new = ids.shape
        positions = np.ascontiguousarray(np.broadcast_to(np.arange(past, past + new), (rows, new)))
        caches = [_random_cache(torch.zeros(rows, 0, width), 1, past).numpy() for width in self._widths]
        return [ids.numpy(), np.ones((rows, past + new), np.int64), positions, *caches]


class Transformers:
    """The checkpoint, by transformers, whose cache has keys and values."""

    def __init__(self, row: Row) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(row.folder, dtype=getattr(torch, row.dtype)).eval()

    def logits(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._model(ids, use_cache=False).logits.float()

    def call(self, rows: int, new: int, past: int) -> Callable[[], Any]:
        from transformers import DynamicCache

        cache, ids = DynamicCache(config=self._model.config), _ids(rows, new)
        if past:
            with torch.inference_mode():
                self._model(_ids(rows, past), past_key_values=cache, logits_to_keep=1)

        def step() -> None:
            with torch.inference_mode():
                self._model(ids, past_key_values=cache)
            cache.crop(-new) if past else cache.reset()

        return step


class Compiled(Transformers):
    """The same through torch.compile, which compiles in the calls that do not count."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self._model.forward = torch.compile(self._model.forward)


WAYS: dict[str, Callable[[Row], Subject]] = {
    "onnxruntime": Onnx,
    "openvino": OpenVino,
    "transformers": Transformers,
    "torch.compile": Compiled,
}
TRANSFORMERS = "transformers.models.deepseek_v3.modeling_deepseek_v3"
IMPORTS = {
    "onnxruntime": "fxquant.lowering.onnx.runner",
    "openvino": "openvino",
    "transformers": TRANSFORMERS,
    "torch.compile": TRANSFORMERS,
}
"""What a way imports before its time and memory are counted."""


def _ids(rows: int, new: int) -> Tensor:
    return torch.randint(IDS, (rows, new), generator=torch.Generator().manual_seed(rows * new))


def _random_cache(empty: Tensor, axis: int, past: int) -> Tensor:
    shape = [past if at == axis else size for at, size in enumerate(empty.shape)]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(empty.dtype)


def measured(row: Row, repeats: int, calls: list[str]) -> Iterator[tuple[str, Any]]:
    """Load time, memory, and of each call the least processor and wall seconds."""
    torch.set_num_threads(1)
    module = import_module(IMPORTS[row.way])
    if row.way == "onnxruntime":
        module.session_options()  # asks the processor what its products are like, once
    before, began, cpu = resident_bytes(), time.perf_counter(), time.process_time()
    subject = WAYS[row.way](row)
    yield "load", [time.process_time() - cpu, time.perf_counter() - began]
    yield "loaded", resident_bytes() - before
    yield "load peak", peak_bytes() - before
    for name in calls:
        yield name, seconds(subject.call(*CALLS[name]), repeats)
    yield "peak", peak_bytes() - before


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """[processor time, wall time] of the quickest call."""
    for _ in range(WARM):
        call()
    least, began = [float("inf")] * 2, time.perf_counter()
    while repeats > 0 or time.perf_counter() - began < SECONDS:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        taken = time.process_time() - cpu, time.perf_counter() - wall
        least = [min(pair) for pair in zip(least, taken, strict=True)]
        repeats -= 1
    return least


def write_logits(row: Row, ids: Path, out: Path) -> None:
    """float16 would hide small differences: float32 of every document of `ids`, a .npz, into another one."""
    torch.set_num_threads(1)
    subject = WAYS[row.way](row)
    with np.load(ids) as documents:
        np.savez(out, **{name: subject.logits(torch.from_numpy(documents[name])).numpy() for name in documents})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", type=json.loads)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", nargs="+", default=list(CALLS))
    parser.add_argument("--logits", nargs=2, type=Path)
    options = parser.parse_args()
    row = Row(**{**options.row, "folder": Path(options.row["folder"])})
    if options.logits:
        write_logits(row, *options.logits)
        return
    print(json.dumps(dict(measured(row, options.repeats, options.calls))))


if __name__ == "__main__":
    main()
