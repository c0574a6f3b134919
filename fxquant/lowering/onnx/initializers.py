"""External initializers for parameters: names and byte ranges in the weight files, nothing copied."""

from collections.abc import Mapping
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


class Initializers:
    """The initializers of a model, in order of first use, each with the name of its tensor on disk."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._values: dict[tuple[str, View], ir.Value] = {}
        self._names: set[str] = set()

    @property
    def values(self) -> list[ir.Value]:
        return list(self._values.values())

    def get(self, name: str, view: View = View.STORED) -> ir.Value:
        """The stored tensor `name`; a second view of the same bytes is named `name (view)`."""
        if (name, view) not in self._values:
            label = f"{name} ({view})" if name in self._names else name
            self._names.add(name)
            self._values[name, view] = external(self._tensors, name, view, label)
        return self._values[name, view]


def external(tensors: Mapping[str, TensorInfo], name: str, view: View, label: str | None = None) -> ir.Value:
    """An initializer over the bytes of one tensor, whose file is beside the model; it has the tensor's name."""
    label = label or name
    info = tensors.get(name)
    if info is None:
        raise FxquantError(name, "is read by the graph but not in the weight files.", "Write the weights first.")
    dtype, shape = _declared(info, view)
    tensor = ir.ExternalTensor(info.file.name, info.start, info.nbytes, dtype, shape=ir.Shape(shape), name=label)
    return ir.Value(name=label, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)


def _declared(info: TensorInfo, view: View) -> tuple[ir.DataType, tuple[int, ...]]:
    if view is View.INT4_PAIRS:
        return ir.DataType.INT4, (*info.shape, 2)
    if view is View.FLOAT_WORDS and info.dtype is torch.int64:
        return ir.DataType.FLOAT, (*info.shape, 2)
    if info.dtype not in DTYPES:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise FxquantError(info.name, f"is stored as {info.dtype}, which has no ONNX form here.", f"Store {dtypes}.")
    return DTYPES[info.dtype], info.shape
