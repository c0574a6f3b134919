"""Plan tally: what a rewritten program reads and writes, by kind and scheme, from shapes alone."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.lowering.output_folder.layout import StoredTensor
from fxquant.planning.gptq_rates import feedback_work, inverse_work
from fxquant.planning.host_benchmark import COPY, GPTQ_FEEDBACK, GPTQ_INVERSE, kernel_name
from fxquant.policy.kinds import Kind
from fxquant.policy.policy import LEAVE_OUT
from fxquant.program.program import Program
from fxquant.schemes.roles import module_and_role
from fxquant.schemes.schemes import Recipe, Scheme, tensor_specs


@dataclass(frozen=True)
class PlanRow:
    """Modules of one kind under one scheme.

    modules     in the checkpoint: each projection of each expert counts
    parameters  elements of their tensors, without FP8 scales
    bytes_in    in the checkpoint, FP8 scales included; what is left out is not read
    bytes_out   tensor data in the weight files
    """

    kind: Kind
    scheme: str
    modules: int
    parameters: int
    bytes_in: int
    bytes_out: int


@dataclass
class Tally:
    """Rows by kind and scheme, and `work`: kernel → weights it quantizes, or bytes it copies.

    Kernels are those of `fxquant.planning.host_benchmark`.
    """

    rows: dict[tuple[Kind, str], PlanRow] = field(default_factory=dict)
    work: dict[str, int] = field(default_factory=dict)

    def add(self, kind: Kind, scheme: str, modules: int, sizes: tuple[int, int], bytes_out: int) -> None:
        """`sizes`: parameters and bytes in the checkpoint."""
        old = self.rows.get((kind, scheme), PlanRow(kind, scheme, 0, 0, 0, 0))
        parameters, bytes_in = sizes
        self.rows[kind, scheme] = PlanRow(
            kind, scheme, old.modules + modules, old.parameters + parameters, old.bytes_in + bytes_in,
            old.bytes_out + bytes_out,
        )  # fmt: skip

    def do(self, kernel: str, amount: int) -> None:
        """Add to the work."""
        self.work[kernel] = self.work.get(kernel, 0) + amount


def tally(program: Program, checkpoint: Checkpoint, stored: list[StoredTensor]) -> Tally:
    """Every tensor of the checkpoint in one row, and every tensor of `stored`."""
    totals = Tally()
    for recipe in program.recipes.values():
        _recipe(totals, program.parameters[recipe.weight_target].kind, recipe, checkpoint)
    for recipe in _distinct_inputs(program):
        totals.do(GPTQ_INVERSE, inverse_work(recipe.in_features) * len(recipe.modules))
    for recipe in program.mtp.recipes.values():
        _recipe(totals, Kind.MTP, recipe, checkpoint)
    kinds = {name: parameter.kind for name, parameter in program.float_names().items()}
    floats: dict[Kind, list[StoredTensor]] = {}
    for tensor in stored:
        if tensor.recipe is None and not tensor.slices:
            floats.setdefault(kinds.get(tensor.name, Kind.MTP), []).append(tensor)
    for kind, tensors in floats.items():
        _floats(totals, kind, tensors, checkpoint)
    left = list(_left_out(program, checkpoint))
    if left:
        totals.add(Kind.MTP, LEAVE_OUT, _modules(left), _sizes(left, checkpoint), 0)
    return totals


def _distinct_inputs(program: Program) -> Iterator[Recipe]:
    """One of the recipes whose codes are found on the same input: in one block, equally wide, on one side of it."""
    asking = [recipe for recipe in program.recipes.values() if recipe.algorithm.from_inputs]
    blocks = {(recipe.module.rpartition(".")[0], recipe.in_features, recipe.row_parallel): recipe for recipe in asking}
    yield from blocks.values()  # calibration inverts one Hessian per input, for all modules that read it


def _recipe(totals: Tally, kind: Kind, recipe: Recipe, checkpoint: Checkpoint) -> None:
    sizes, written = _sizes(recipe.source_names, checkpoint), sum(s.nbytes for s in tensor_specs(recipe).values())
    totals.add(kind, recipe.scheme.value, len(recipe.modules), sizes, written * len(recipe.modules))
    fp8 = recipe.weight_names[0] in checkpoint.scales
    weights = recipe.out_features * recipe.in_features * len(recipe.modules)
    totals.do(kernel_name(recipe.bits, recipe.group_size, fp8, recipe.algorithm.scales), weights)
    if recipe.algorithm.from_inputs:
        totals.do(GPTQ_FEEDBACK, feedback_work(recipe.out_features, recipe.in_features) * len(recipe.modules))


def _floats(totals: Tally, kind: Kind, tensors: list[StoredTensor], checkpoint: Checkpoint) -> None:
    names = [tensor.name for tensor in tensors]
    written = sum(tensor.spec.nbytes for tensor in tensors)
    totals.add(kind, Scheme.FLOAT.value, _modules(names), _sizes(names, checkpoint), written)
    totals.do(COPY, written)


def _left_out(program: Program, checkpoint: Checkpoint) -> Iterator[str]:
    rules = program.rules
    prefixes = tuple(f"{path}." for path in program.mtp.layers if rules[path].scheme == LEAVE_OUT)
    return (name for name in checkpoint.tensors if prefixes and name.startswith(prefixes))


def _modules(names: Iterable[str]) -> int:
    return len({module_and_role(name)[0] for name in names})


def _sizes(names: Iterable[str], checkpoint: Checkpoint) -> tuple[int, int]:
    """Parameters and bytes."""
    parameters = nbytes = 0
    for name in names:
        info, scale = checkpoint.tensors[name], checkpoint.scales.get(name)
        parameters += math.prod(info.shape)
        nbytes += sum(part.nbytes for part in info.parts) + (scale.nbytes if scale is not None else 0)
    return parameters, nbytes
