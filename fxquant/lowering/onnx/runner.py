"""Runner of an emitted ONNX model, with onnxruntime on CPU."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from fxquant.engines.table import onnx_targets
from fxquant.errors import FxquantError
from fxquant.lowering.onnx.builder import IR_VERSION, OPSET, ZERO_POINT, Builder
from fxquant.lowering.onnx.prepacked import mapped_options, prepacked
from fxquant.lowering.onnx.runtime import onnxruntime
from fxquant.processes.memory import return_freed_memory

FILE = "model.onnx"
PRECISE = "session.x64quantprecision"


def session_options(threads: int = 0) -> onnxruntime.SessionOptions:
    """Options of every session here. `threads` 0: one per core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if products_saturate():
        options.add_session_config_entry(PRECISE, "1")
    return options


@functools.cache
def products_saturate() -> bool:
    """Whether this CPU adds pairs of u8 x s8 products in saturating int16, as x86 without VNNI does.

    If so, the option PRECISE makes onnxruntime multiply u8 x u8. On other CPUs it would only cost time, about a factor
    of two.
    """
    features = 64
    b = Builder()
    x = ir.Value(name="x", shape=ir.Shape([None, features]), type=ir.TensorType(ir.DataType.UINT8))
    weight = b.constant(np.full((features, 16), 127, dtype=np.int8))
    product = b.op("MatMulInteger", x, weight, b.constant(np.uint8(ZERO_POINT)))
    product.dtype = ir.DataType.INT32
    graph = ir.Graph([x], [product], nodes=b.nodes, opset_imports={"": OPSET}, name="probe")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    # the largest operands: a pair of products 255 * 127 exceeds int16
    (sums,) = session.run(None, {"x": np.full((4, features), 255, dtype=np.uint8)})
    return bool((sums != features * 127 * 127).any())


TOKENS = 3
"""Inputs of token ids, mask and positions, in this order, before all others."""
PAST, PRESENT, LAST = "past_key_values.", "present.", "num_logits_to_keep"
DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


@dataclass(frozen=True)
class CacheInput:
    """A cache of the graph: its name, dtype, and shape with None for batch and past."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]

    @property
    def past_axis(self) -> int:
        """The axis of the tokens so far."""
        return self.shape.index(None, 1)

    def sizes(self, batch: int, tokens: int) -> list[int]:
        """Shape of the cache of so many rows and tokens."""
        return [batch, *(tokens if size is None else size for size in self.shape[1:])]


class OnnxRunner:
    """The `model.onnx` of a folder, its weight files beside it.

    last_logits  have the logits of the last token alone, if the graph can
    prepack      folder of prepacked weights: the model is mapped from there, after it was written at first
    past_axes    of each cache, the axis of the tokens so far
    """

    def __init__(self, folder: Path, threads: int = 0, last_logits: bool = False, prepack: Path | None = None) -> None:
        path = folder / FILE
        if not path.is_file():
            raise FxquantError(path, "no such file.", f"Compile with --target {' or '.join(onnx_targets())}.")
        options = session_options(threads)
        if prepack is not None:
            path, options = prepacked(path, prepack, session_options), mapped_options(options)
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise FxquantError(path, f"onnxruntime {onnxruntime.__version__} cannot load it: {error}") from error
        return_freed_memory()  # constant folding of int4 weights leaves several times what the session uses
        inputs = self._session.get_inputs()
        self._tokens = [input_.name for input_ in inputs[:TOKENS]]
        self._caches = [_cache(input_) for input_ in inputs if input_.name.startswith(PAST)]
        self._presents = [PRESENT + cache.name.removeprefix(PAST) for cache in self._caches]
        self._constant = {
            input_.name: np.full([1] * len(input_.shape), int(last_logits), dtype=np.int64)
            for input_ in inputs
            if input_.name == LAST
        }
        self.past_axes = [cache.past_axis for cache in self._caches]

    def __call__(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """ids, positions int64 [B, S]; mask int64 [B, T]; past: caches of T - S tokens, in the order,
        dtypes and shapes of the graph's inputs.

        → logits float32 [B, S, vocabulary], or [B, 1, vocabulary] with `last_logits`; caches of T tokens. Nothing is
        copied: the session reads these tensors, and the results are its own.
        """
        names = [*self._tokens, *(cache.name for cache in self._caches)]
        feeds = zip(names, (ids, mask, positions, *past), strict=True)
        given = {name: np.ascontiguousarray(value.numpy()) for name, value in feeds}
        results = self._session.run(["logits", *self._presents], given | self._constant)
        logits, *presents = (torch.from_numpy(result) for result in results)
        return logits, presents

    def empty_cache(self, batch: int) -> list[Tensor]:
        """`past` for the first call."""
        return [torch.zeros(cache.sizes(batch, 0), dtype=cache.dtype) for cache in self._caches]

    def prefill(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and caches of unpadded `ids` int64 [batch, length]."""
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        return self(ids, torch.ones_like(ids), positions, self.empty_cache(len(ids)))


def _cache(input_: onnxruntime.NodeArg) -> CacheInput:
    shape = tuple(size if isinstance(size, int) else None for size in input_.shape)
    if input_.type not in DTYPES or shape[:1] != (None,) or shape.count(None) != 2:
        fact = f"is a cache {input_.type}{input_.shape}."
        raise FxquantError(input_.name, fact, f"A cache is one of {', '.join(DTYPES)}, with axes for batch and past.")
    return CacheInput(input_.name, DTYPES[input_.type], shape)
