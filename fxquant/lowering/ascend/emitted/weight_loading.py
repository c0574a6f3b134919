"""Weight loading of an emitted module: tensors of the weight files, in the layout that the operators take.

The emitter copies the source of these classes and functions into the module that it writes. n out_features,
k in_features, G groups of k. Layouts are functions (dtype the model runs in, *stored tensors) -> tensor.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


class WeightFiles:
    """Tensors of a folder's weight files by name, each read on demand."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}
        self._files: dict[str, str] = {}
        for index in sorted(folder.glob("*.safetensors.index.json")):
            self._files |= json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for file in [] if self._files else sorted(folder.glob("*.safetensors")):
            self._files |= dict.fromkeys(self._handle(file.name).keys(), file.name)

    def __call__(self, name: str) -> Tensor:
        if name not in self._files:
            raise KeyError(f"{self._folder}: its weight files have no tensor {name}")
        return self._handle(self._files[name]).get_tensor(name)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(self._folder / file, framework="pt")
        return self._open[file]


@dataclass(frozen=True)
class Stored:
    """How a tensor of a block is made from stored ones: `layout(dtype, *tensors)`.

    names     relative to the block, unless they are the key of this entry
    experts   0, or the number of stacked tensors: `{}` in names is the expert's number (or its text, in a tuple)
    absolute  names are not relative to the block
    """

    layout: Callable[..., Tensor]
    names: tuple[str, ...] = ()
    experts: int | tuple[str, ...] = 0
    absolute: bool = False


def load_stored(read: Callable[[str], Tensor], stored: Stored, names: list[str], dtype: torch.dtype) -> Tensor:
    """One tensor, or a stack [experts, ...] filled expert by expert."""

    def tensor_of(expert: str) -> Tensor:
        return stored.layout(dtype, *(read(name.format(expert)) for name in names))

    if not stored.experts:
        return tensor_of("")
    numbers = range(stored.experts) if isinstance(stored.experts, int) else stored.experts
    experts = [str(number) for number in numbers]
    first = tensor_of(experts[0])
    stack = first.new_empty((len(experts), *first.shape))
    stack[0] = first
    for index, expert in enumerate(experts[1:], 1):
        stack[index] = tensor_of(expert)
    return stack


def load_table(
    read: Callable[[str], Tensor], table: dict[str, Stored], prefix: str, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """All tensors of a block, whose stored names begin with `prefix`."""
    loaded = {}
    for key, stored in table.items():
        names = [name if stored.absolute else prefix + name for name in stored.names or (key,)]
        loaded[key] = load_stored(read, stored, names, dtype).to(device)
    return loaded


def floating(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """In the dtype in which the model runs."""
    return tensor.to(dtype)


def float32(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """In float32, whatever the dtype of the model."""
    return tensor.float()


def as_stored(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """Unchanged."""
    return tensor


def floating_transposed(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """float [n, k] -> [k, n]."""
    return weight.to(dtype).t()


def quantizer_scale(dtype: torch.dtype, scale: Tensor) -> Tensor:
    """As stored, or float32 if that is float16, by which npu_quantize cannot divide."""
    return scale.float() if scale.dtype is torch.float16 else scale


def quantizer_offset(dtype: torch.dtype, offset: Tensor) -> Tensor:
    """As stored, or int32 if that is float16: it is a whole number."""
    return offset.int() if offset.dtype is torch.float16 else offset


def int8_transposed(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """int8 [n, k] -> [k, n]."""
    return weight.t()


def channel_scale(dtype: torch.dtype, scale: Tensor) -> Tensor:
    """float32 [n, 1] -> [n]."""
    return scale.float().flatten()


def expert_scale(dtype: torch.dtype, scale: Tensor) -> Tensor:
    """[n, 1] -> [n]; npu_grouped_matmul takes bfloat16 scales for a bfloat16 result, float32 ones for others."""
    return scale.to(torch.bfloat16 if dtype is torch.bfloat16 else torch.float32).flatten()


def int4_words(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """Bytes [n / 2, k] of two output channels each -> int32 [k, n / 8], the lowest n in the lowest four bits."""
    return weight.t().contiguous().view(torch.int32)


def group_scale(dtype: torch.dtype, scale: Tensor, second: Tensor) -> Tensor:
    """[n, 1] times [n, G], rounded to float16 as engines do -> int64 [G, n], float32 bits in the low word."""
    return channel_scale_word(dtype, (scale.float() * second.float()).half().float())


def channel_scale_word(dtype: torch.dtype, scale: Tensor) -> Tensor:
    """float32 [n, G] -> int64 [G, n], its bits in the low word."""
    return scale.float().t().contiguous().view(torch.int32).long() & 0xFFFFFFFF


def summed(dtype: torch.dtype, scale_bias: Tensor) -> Tensor:
    """float32 [n, 1 or 16], one column for each part of k -> [n]."""
    return scale_bias.float().sum(-1)


def int4_words_unpacked(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """Codes [n, k], one per byte -> int32 [k, n / 8], the lowest n in the lowest four bits."""
    return int4_words(dtype, (weight[0::2] & 0xF) | (weight[1::2] << 4))


def channel_scale_bias(dtype: torch.dtype, weight: Tensor, scale: Tensor) -> Tensor:
    """Codes [n, k], scale [n, 1] -> the constant of the nibble arithmetic, 8 * scale * their sum [n]."""
    return (8 * scale.double().flatten() * weight.sum(-1)).float()


def group_scale_bias(dtype: torch.dtype, weight: Tensor, scale: Tensor, second: Tensor) -> Tensor:
    """The same with codes times second [n, G], whole numbers."""
    sums = (weight.unflatten(-1, (second.shape[-1], -1)).sum(-1) * second.double()).sum(-1)
    return (8 * scale.double().flatten() * sums).float()
