"""External initializers for parameters: names and byte ranges in the weight files, nothing copied."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import onnx_ir as ir
import torch

from fxquant.errors import FxquantError
from fxquant.lowering.onnx.shapes import DTYPES
from fxquant.storage.safetensors import TensorInfo


class View(StrEnum):
    """How the bytes of a stored tensor are declared."""

    STORED = "stored"
    INT4_PAIRS = "int4 pairs"
    FLOAT_WORDS = "float words"


@dataclass(frozen=True)
class Blocks:
    """View of int4 weights, uint8 [n, k/2], in blocks: [n, k/size, size/2]."""

    size: int

    def __str__(self) -> str:
        return f"blocks of {self.size}"


class Initializers:
    """The initializers of a model, in order of first use, each with the name of its tensor on disk."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._values: dict[tuple[str, View | Blocks], ir.Value] = {}
        self._names: set[str] = set()

    @property
    def values(self) -> list[ir.Value]:
        return list(self._values.values())

    def get(self, name: str, view: View | Blocks = View.STORED) -> ir.Value:
        """The stored tensor `name`; a second view of the same bytes is named `name (view)`."""
        if (name, view) not in self._values:
            label = f"{name} ({view})" if name in self._names else name
            self._names.add(name)
            self._values[name, view] = external(self._tensors, name, view, label)
        return self._values[name, view]


def external(tensors: Mapping[str, TensorInfo], name: str, view: View | Blocks, label: str | None = None) -> ir.Value:
    """An initializer over the bytes of one tensor, whose file is beside the model; it has the tensor's name."""
    label = label or name
    info = tensors.get(name)
    if info is None:
        raise FxquantError(name, "is read by the graph but not in the weight files.", "Write the weights first.")
    dtype, shape = _declared(info, view)
    tensor = ir.ExternalTensor(info.file.name, info.start, info.nbytes, dtype, shape=ir.Shape(shape), name=label)
    return ir.Value(name=label, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)


def _declared(info: TensorInfo, view: View | Blocks) -> tuple[ir.DataType, tuple[int, ...]]:
    if isinstance(view, Blocks):
        return ir.DataType.UINT8, (info.shape[0], 2 * info.shape[1] // view.size, view.size // 2)
    if view is View.INT4_PAIRS:
        return ir.DataType.INT4, (*info.shape, 2)
    if view is View.FLOAT_WORDS and info.dtype is torch.int64:
        return ir.DataType.FLOAT, (*info.shape, 2)
    if info.dtype is torch.uint8:  # packed int4: no operator of the graph has values of this dtype
        return ir.DataType.UINT8, info.shape
    if info.dtype not in DTYPES:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise FxquantError(info.name, f"is stored as {info.dtype}, which has no ONNX form here.", f"Store {dtypes}.")
    return DTYPES[info.dtype], info.shape
