"""Checkpoint folders: safetensors read tensor by tensor under Hugging Face names, FP8 blocks decoded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.checkpoint.config import read_config
from fxquant.checkpoint.index import AGAIN, SCALE_SUFFIX, indexed_tensors
from fxquant.checkpoint.model_dtype import model_dtype, with_dtype
from fxquant.checkpoint.model_parallel_parts import HeldTensor, SourceTensor, join_parts, part_files
from fxquant.checkpoint.tensor_names import official_tensors
from fxquant.errors import FxquantError
from fxquant.storage.safetensors import read_header
from fxquant.transforms.weight_transforms import WeightTransforms

SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
"""dtypes of stored block scales; all decode to float32. F8_E8M0 is `2 ** (byte - 127)`, and 255 is NaN."""
LARGEST_BLOCK = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A folder's config and tensors. `tensors` holds the model's tensors, `scales` the block scales of FP8 ones.

    Keys and names are Hugging Face's, whatever the folder uses. `transforms` are applied as tensors are read.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, SourceTensor]
    scales: Mapping[str, SourceTensor] = field(default_factory=dict)
    block: tuple[int, int] = (128, 128)
    transforms: WeightTransforms = field(default_factory=WeightTransforms)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype: config's `torch_dtype` (or `dtype`). FP8 weights are decoded to it."""
        return model_dtype(self.config, self.folder / "config.json")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, scales included."""
        return sum(info.nbytes for info in (*self.tensors.values(), *self.scales.values()))

    def transformed(self, transforms: WeightTransforms) -> "Checkpoint":
        """The checkpoint with these transforms, and with the biases that they add."""
        added = {
            name: HeldTensor(name, value) for name, value in transforms.tensors.items() if name not in self.tensors
        }
        return replace(self, tensors={**self.tensors, **added}, transforms=transforms)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of `read(name)`."""
        dtype = self.tensors[name].dtype
        return self.dtype if dtype is torch.float8_e4m3fn else dtype

    def read(self, name: str) -> Tensor:
        """One tensor, transformed. FP8 [n, k] is decoded: `dtype(float32(w) * scale_inv[i // 128, j // 128])`."""
        if name in self.transforms.tensors:
            return self.transforms.tensors[name]
        tensor = self.tensors[name].read()
        if tensor.dtype is torch.float8_e4m3fn:
            tensor = decode_fp8(tensor, self.scales[name].read(), self.block).to(self.dtype)
        return self.transforms.apply(name, tensor, len(tensor)) if self.transforms.changes(name) else tensor

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows [start, end) of `read(name)`. Reads no others, but for those that a rotation mixes them with."""
        tensor = self.tensors[name]
        if name in self.transforms.tensors or self.transforms.mixes_rows(name) or isinstance(tensor, HeldTensor):
            return self.read(name)[start:end]
        encoded, width = tensor.dtype is torch.float8_e4m3fn, tensor.nbytes // tensor.shape[0]
        first = start // self.block[0] * self.block[0] if encoded else start  # a row of block scales
        data = tensor.read_bytes(first * width, (end - first) * width)
        rows = torch.frombuffer(data, dtype=tensor.dtype).view(-1, *tensor.shape[1:])
        if encoded:
            scales = self.scales[name].read()[first // self.block[0] :]
            rows = decode_fp8(rows, scales, self.block).to(self.dtype)[start - first :]
        return self.transforms.apply(name, rows, tensor.shape[0], start) if self.transforms.changes(name) else rows


def decode_fp8(weight: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> Tensor:
    """FP8 [n, k] times its block scales [ceil(n / block[0]), ceil(k / block[1])], of `SCALES`, as float32."""
    rows, columns = weight.shape
    # cut after repeating: blocks at the edges may be partial
    wide = scale_inv.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * wide


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and every safetensors header of `folder`, but no tensor."""
    config = read_config(folder)
    infos = _tensors(folder)
    scales, tensors = {}, {}
    for name, info in infos.items():
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight != name and weight in infos:  # a scale without its weight stays a tensor, which the ledger reports
            scales[weight] = info
        else:
            tensors[name] = info
    block = block_size(folder / "config.json", config)
    for name, info in tensors.items():
        _check_scale(info, scales.get(name), block)
    return Checkpoint(folder, with_dtype(config, tensors.values(), folder / "config.json"), tensors, scales, block)


def open_config(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; without weights, its config.json and no tensors."""
    if any(folder.glob("*.safetensors")):
        return open_checkpoint(folder)
    config = read_config(folder)
    place = folder / "config.json"
    return Checkpoint(folder, with_dtype(config, (), place), {}, {}, block_size(place, config))


def _tensors(folder: Path) -> Mapping[str, SourceTensor]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise FxquantError(folder, f"{len(indexes)} index files.", "Keep only the checkpoint's own.")
    if indexes:
        return official_tensors(indexed_tensors(folder, indexes[0]))
    if parts := part_files(folder):
        return join_parts(parts)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        content = f"{len(files)} safetensors files and no index" if files else "no safetensors file"
        way_out = "Pass a folder with the weights and their index; plan, show and targets need only its config.json."
        raise FxquantError(folder, f"not a checkpoint: {content}.", way_out)
    return official_tensors(read_header(files[0]))


def block_size(place: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns that share one FP8 scale. Raises FxquantError for any other quantization."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return (128, 128)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "fp8" or not isinstance(quantization, dict):
        way_out = "fxquant compiles float checkpoints and DeepSeek's official FP8."
        raise FxquantError(place, f"already quantized: quant_method {method!r}.", way_out)
    size = quantization.get("weight_block_size", [128, 128])
    numbers = isinstance(size, list) and len(size) == 2 and all(type(edge) is int for edge in size)
    if not (numbers and all(0 < edge <= LARGEST_BLOCK for edge in size)):
        way_out = f"It must be two positive integers, at most {LARGEST_BLOCK:,}."
        raise FxquantError(place, f"weight_block_size is {str(size)[:80]}.", way_out)
    return size[0], size[1]


def _check_scale(info: SourceTensor, scale: SourceTensor | None, block: tuple[int, int]) -> None:
    if info.dtype is not torch.float8_e4m3fn:
        if scale is not None:
            raise FxquantError(scale.file, f"{scale.name} scales {info.name}, which is not FP8.", AGAIN)
        return
    if scale is None or len(info.shape) != 2:
        raise FxquantError(info.file, f"FP8 tensor {info.name} has no {SCALE_SUFFIX[1:]}.", AGAIN)
    expected = tuple(-(-edge // size) for edge, size in zip(info.shape, block, strict=True))
    if scale.shape != expected:
        fact = f"{scale.name}: {list(scale.shape)}, not {list(expected)}, one per block of {block[0]} x {block[1]}."
        raise FxquantError(scale.file, fact, "Check weight_block_size in config.json.")
    if scale.dtype not in SCALES:
        names = ", ".join(str(dtype) for dtype in SCALES)
        raise FxquantError(scale.file, f"{scale.name}: block scales in {scale.dtype}.", f"fxquant reads {names}.")
