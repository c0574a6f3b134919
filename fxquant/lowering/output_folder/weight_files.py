"""Weight files of an output folder, found under the names of any engine."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fxquant.engines.table import weight_stems
from fxquant.errors import FxquantError
from fxquant.lowering.output_folder.layout import MTP_STEM
from fxquant.lowering.output_folder.stacks import Slice, stacked_experts, stacks_of
from fxquant.program.program import Program
from fxquant.storage.safetensors import TensorInfo, read_header
from fxquant.storage.sliced_tensor import SlicedTensor

STEMS = (*weight_stems(), MTP_STEM)


class WeightFiles:
    """Reader of the weight files of an output folder, tensor by tensor; nothing is mapped into memory.

    infos  every stored tensor; `tensors`: with the slices of the experts that `program`, the folder's, has in stacks
    """

    def __init__(self, folder: Path, program: Program | None = None) -> None:
        files = sorted({file for stem in STEMS for file in folder.glob(f"{stem}*.safetensors")})
        if not files:
            names = ", ".join(f"{stem}*.safetensors" for stem in STEMS)
            raise FxquantError(folder, f"has no weight file: {names}.", "Compile again.")
        self.folder, self._program = folder, program
        self.infos: dict[str, TensorInfo] = {}
        for file in files:
            self.infos |= read_header(file)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo | SlicedTensor]:
        """By the names of modules and roles. A stack of the wrong size has no slices."""
        found: dict[str, TensorInfo | SlicedTensor] = dict(self.infos)
        for experts in [] if self._program is None else stacked_experts(self._program):
            for stack in stacks_of(experts):
                info = found.pop(stack.name, None)
                if isinstance(info, TensorInfo) and (info.dtype, info.shape) == (stack.spec.dtype, stack.spec.shape):
                    found |= {part.name: _sliced(part, info) for part in stack.slices}
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, as stored, without its neighbours in a stack."""
        return self.tensors[name].read()

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows [start, end) of one tensor, as stored."""
        info = self.tensors[name]
        width = info.nbytes // info.shape[0]
        data = info.read_bytes(start * width, (end - start) * width)
        return torch.frombuffer(data, dtype=info.dtype).view(-1, *info.shape[1:])


def _sliced(part: Slice, stack: TensorInfo) -> SlicedTensor:
    return SlicedTensor(part.name, part.spec.shape, stack, part.runs)
