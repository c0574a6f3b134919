"""Layout of the weight files: each tensor's file and offset, known from the graph before a byte is read."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import attrgetter
from typing import NamedTuple

import torch

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.engine import Engine, numbered
from fxquant.lowering.output_folder.stacks import Slice, stacked_experts, stacks_of
from fxquant.program.experts import ExpertRecipes
from fxquant.program.operands import operand_node
from fxquant.program.program import Program
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe, Scheme, TensorSpec, tensor_specs
from fxquant.storage.safetensors import build_header, header_length, quoted_size
from fxquant.storage.sliced_tensor import Runs

MTP_STEM = "mtp_float"
MAX_SHARD_SIZE = 4 << 30
"""Default maximum bytes of tensor data per weight file."""


class StoredTensor(NamedTuple):
    """One tensor of the output: made by `recipe` for `module`, or without a recipe a float tensor of the checkpoint.

    mtp     whether it is part of a multi-token prediction layer
    role    its role in the module, if a recipe makes it
    slices  of a tensor of all experts: what recipes make of it, each for one expert
    runs    of such a slice: where it lies in that tensor
    """

    name: str
    spec: TensorSpec
    module: str
    recipe: Recipe | None = None
    mtp: bool = False
    role: str = ""
    slices: tuple[Slice, ...] = ()
    runs: Runs | None = None

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def parts(self) -> Iterator["StoredTensor"]:
        """What is made in one step: its slices, or itself."""
        if not self.slices:
            yield self
        for slice_ in self.slices:
            module, role, recipe, spec, runs = slice_
            yield StoredTensor(slice_.name, spec, module, recipe, self.mtp, role, runs=runs)


@dataclass(frozen=True)
class FileLayout:
    """One weight file: its header, and each tensor's absolute offset. The header is built on first use."""

    name: str
    tensors: tuple[StoredTensor, ...]

    @property
    def header(self) -> bytes:
        return self._built[0]

    @property
    def offsets(self) -> tuple[int, ...]:
        return self._built[1]

    @cached_property
    def nbytes(self) -> int:
        ends = list(accumulate(map(attrgetter("spec.nbytes"), self.tensors)))
        forms = [(spec.dtype, spec.shape, count) for spec, count in self.specs]
        # a plan asks for sizes alone: no header is built
        return header_length(self.names_size, forms, ends) + (ends[-1] if ends else 0)

    @cached_property
    def data_bytes(self) -> int:
        """Size without the header."""
        return sum(spec.nbytes * count for spec, count in self.specs)

    @cached_property
    def names_size(self) -> int:
        """Bytes of all names as JSON strings."""
        return quoted_size([tensor.name for tensor in self.tensors])

    @cached_property
    def specs(self) -> list[tuple[TensorSpec, int]]:
        """Specs of the tensors, each with the number of tensors that have it; equal specs may occur more than once."""
        counts = Counter(map(id, map(attrgetter("spec"), self.tensors)))
        specs = {id(tensor.spec): tensor.spec for tensor in self.tensors}
        return [(specs[key], count) for key, count in counts.items()]

    @cached_property
    def _built(self) -> tuple[bytes, tuple[int, ...]]:
        header, offsets = build_header([(tensor.name, tensor.spec.dtype, tensor.spec.shape) for tensor in self.tensors])
        return header, tuple(offsets)


def stored_tensors(program: Program, checkpoint: Checkpoint) -> list[StoredTensor]:
    """All tensors of the output, in graph order, those of one module side by side; experts' may be in stacks."""
    stored: list[StoredTensor] = []
    stacked = {recipe.module: experts for experts in stacked_experts(program) for recipe in experts.all}
    floats = program.float_names()
    biases = gate_biases(program)
    seen: set[str] = set()
    for target, parameter in program.parameters.items():
        recipe = program.recipes.get(parameter.module)
        if recipe is not None and parameter.module not in seen:
            experts = stacked.get(parameter.module)
            seen.update([parameter.module] if experts is None else [each.module for each in experts.all])
            stored += _made(recipe) if experts is None else _stacked(experts)
        for name in parameter.names:
            if name in floats:
                dtype = torch.float32 if target in biases else checkpoint.stored_dtype(name)
                spec = TensorSpec(dtype, checkpoint.tensors[name].shape, Scheme.FLOAT.value)
                stored.append(StoredTensor(name, spec, parameter.module))
    return stored + _mtp(program, checkpoint)


def _made(recipe: Recipe, mtp: bool = False) -> list[StoredTensor]:
    return [
        StoredTensor(tensor_name(module, role), spec, module, recipe, mtp, role)
        for module in recipe.modules
        for role, spec in tensor_specs(recipe).items()
    ]


def _stacked(experts: ExpertRecipes) -> list[StoredTensor]:
    return [StoredTensor(stack.name, stack.spec, "", slices=stack.slices) for stack in stacks_of(experts)]


def _mtp(program: Program, checkpoint: Checkpoint) -> list[StoredTensor]:
    stored = [tensor for recipe in program.mtp.recipes.values() for tensor in _made(recipe, mtp=True)]
    for name, module in program.mtp.float_tensors.items():
        dtype = torch.float32 if name in program.mtp.gate_biases else checkpoint.stored_dtype(name)
        spec = TensorSpec(dtype, checkpoint.tensors[name].shape, Scheme.FLOAT.value)
        stored.append(StoredTensor(name, spec, module, mtp=True))
    return stored


def gate_biases(program: Program) -> set[str]:
    """Correction biases: experts are chosen in float32, so these are stored in float32 whatever the checkpoint has."""
    return {str(operand_node(node, "correction_bias").target) for node in program.nodes(ops.moe_gate)}


def plan_files(stored: list[StoredTensor], max_shard_size: int, engine: Engine) -> list[FileLayout]:
    """Fill files in graph order up to `max_shard_size` bytes of data each; a larger tensor gets its own file.

    Inside a file tensors are ordered by decreasing item size, then name: each one is aligned, and the bytes depend on
    nothing but the graph. Float multi-token prediction layers get separate files if the engine expects that.
    """
    apart = [tensor for tensor in stored if tensor.mtp and engine.mtp_files]
    if any(tensor.recipe is not None for tensor in apart):
        apart = []  # the separate files are for layers that are float throughout
    groups = _filled([tensor for tensor in stored if not apart or not tensor.mtp], max_shard_size)
    files = [_file(engine.file_name(part, len(groups)), group) for part, group in enumerate(groups, 1)]
    extra = _filled(apart, max_shard_size) if apart else []
    return files + [_file(numbered(MTP_STEM, part, len(extra)), group) for part, group in enumerate(extra, 1)]


def _filled(stored: list[StoredTensor], max_shard_size: int) -> list[list[StoredTensor]]:
    groups: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in stored:
        nbytes = tensor.spec.nbytes
        if groups[-1] and size + nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    return groups


def _file(name: str, group: list[StoredTensor]) -> FileLayout:
    by_size: dict[int, list[StoredTensor]] = {}
    for tensor in group:
        by_size.setdefault(tensor.spec.dtype.itemsize, []).append(tensor)
    in_order = (sorted(by_size[size], key=attrgetter("name")) for size in sorted(by_size, reverse=True))
    return FileLayout(name, tuple(tensor for part in in_order for tensor in part))
