"""Which tensors the weight files hold, in which file and where, known from the graph before a byte is read."""

from dataclasses import dataclass

import torch

from fxquant import ops
from fxquant.checkpoint import Checkpoint
from fxquant.program import Program, input_node
from fxquant.safetensors_file import build_header
from fxquant.schemes import Recipe, Scheme, TensorSpec, tensor_specs

STEM = "quant_model_weight_w8a8"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the output: made by `recipe` for `module`, or kept from the checkpoint when there is none."""

    name: str
    spec: TensorSpec
    module: str
    recipe: Recipe | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.spec.shape).numel() * self.spec.dtype.itemsize


@dataclass(frozen=True)
class FileLayout:
    """One weight file: its header, and each tensor's absolute offset."""

    name: str
    header: bytes
    tensors: tuple[StoredTensor, ...]
    offsets: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def stored_tensors(program: Program, checkpoint: Checkpoint) -> list[StoredTensor]:
    """Everything the output holds, in graph order, the tensors of one module side by side."""
    stored: list[StoredTensor] = []
    kept = program.kept_names()
    gate_biases = _gate_biases(program)
    seen: set[str] = set()
    for target, parameter in program.parameters.items():
        recipe = program.recipes.get(parameter.module)
        if recipe is not None and parameter.module not in seen:
            seen.add(parameter.module)
            specs = tensor_specs(recipe)
            stored += [
                StoredTensor(f"{module}.{suffix}", spec, module, recipe)
                for module in recipe.modules
                for suffix, spec in specs.items()
            ]
        for name in parameter.names:
            if name in kept:
                dtype = torch.float32 if target in gate_biases else checkpoint.stored_dtype(name)
                spec = TensorSpec(dtype, checkpoint.tensors[name].shape, Scheme.FLOAT.value)
                stored.append(StoredTensor(name, spec, parameter.module))
    return stored


def _gate_biases(program: Program) -> set[str]:
    """Correction biases choose experts in float32, so they are stored in it whatever the checkpoint has."""
    return {str(input_node(node, 1).target) for node in program.nodes(ops.moe_gate)}


def plan_files(stored: list[StoredTensor], max_shard_size: int) -> list[FileLayout]:
    """Fill files in graph order up to `max_shard_size` bytes of data each; a larger tensor gets a file of its own.

    Inside a file tensors are ordered by falling item size, then name: every one is aligned, and the bytes depend on
    nothing but the graph.
    """
    groups: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in stored:
        if groups[-1] and size + tensor.nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return [_file(_file_name(index, len(groups)), group) for index, group in enumerate(groups, 1)]


def _file_name(index: int, count: int) -> str:
    return f"{STEM}.safetensors" if count == 1 else f"{STEM}-{index:05d}-of-{count:05d}.safetensors"


def _file(name: str, group: list[StoredTensor]) -> FileLayout:
    tensors = tuple(sorted(group, key=lambda tensor: (-tensor.spec.dtype.itemsize, tensor.name)))
    header, offsets = build_header([(tensor.name, tensor.spec.dtype, tensor.spec.shape) for tensor in tensors])
    return FileLayout(name, header, tensors, tuple(offsets))
