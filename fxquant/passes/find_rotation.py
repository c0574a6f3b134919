"""Hadamard rotation: finds in the graph what may be rotated, the residual stream and the values of each head.

The stream is the embedding, what linears and experts add to it, and every sum of these; only norms read it, and only
linears read these norms. Calibration rotates the weights, without text if there is nothing to observe.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.passes.base import Pass, PassResult
from fxquant.policy.policy import Policy
from fxquant.program.linears import READS, is_parameter, not_scalable, reads, weight_uses
from fxquant.program.operands import arguments, operand, operand_node
from fxquant.program.program import Program
from fxquant.transforms.hadamard import NoHadamardError, base_order
from fxquant.transforms.rotation import Rotate, Rotation

ADD = torch.ops.aten.add.Tensor
WRITES = {ops.embedding: "weight", ops.linear: "weight", ops.moe_experts: "down_proj"}
"""Operator that may add to the stream → its argument for the weight that computes what it adds."""


@dataclass
class FindRotation(Pass):
    """Fills `program.rotations` as `policy.rotate` says. Raises FxquantError, with the reason, if a value cannot be."""

    policy: Policy
    name = "rotation"

    def apply(self, program: Program) -> PassResult:
        if Rotate.HIDDEN in self.policy.rotate and program.mtp.stored:
            fact = "rotate: hidden rotates what multi-token prediction layers read, and they are not in the graph."
            raise FxquantError(f"policy {self.policy.name}", fact, "Leave them out with --mtp none, or rotate heads.")
        try:
            program.rotations = find_rotations(program, self.policy.rotate)
            program.stream = _size(program, _stream(program)) if Rotate.HIDDEN in self.policy.rotate else 0
        except NotRotatedError as error:
            way_out = "Remove it from rotate in the policy."
            raise FxquantError(f"policy {self.policy.name}", f"rotate: {error}.", way_out) from None
        return PassResult(self.name, tuple(program.rotations))


class NotRotatedError(ValueError):
    """Why a value cannot be rotated."""


def find_rotations(program: Program, parts: tuple[Rotate, ...]) -> dict[str, Rotation]:
    """Checkpoint weight → how it is rotated, sorted by name; raises NotRotatedError."""
    rotations: dict[str, Rotation] = {}
    uses = weight_uses(program)
    try:
        if Rotate.HEADS in parts:
            for weight, rotation in _heads(program, uses):
                _add_rotation(program, rotations, weight, rotation)
        if Rotate.HIDDEN in parts:
            for weight, rotation in _hidden(program, uses):
                _add_rotation(program, rotations, weight, rotation)
    except NoHadamardError as error:
        raise NotRotatedError(str(error)) from None
    return dict(sorted(rotations.items()))


def _add_rotation(program: Program, rotations: dict[str, Rotation], weight: fx.Node, rotation: Rotation) -> None:
    """Combine with an earlier rotation: o_proj is rotated by columns for the heads, and by rows for the stream."""
    for name in program.parameters[str(weight.target)].names:
        before = rotations.setdefault(name, rotation)
        # a rotation of rows alone has heads > 0, one of columns alone has 0: sorted, columns come first
        columns, rows = sorted((before, rotation), key=lambda part: part.heads)
        if before is not rotation and (columns.heads or rows.columns):
            raise NotRotatedError(f"{name} would be rotated twice")
        rotations[name] = replace(rows, columns=columns.columns, norm=columns.norm)


def _heads(program: Program, uses: Counter[str]) -> Iterator[tuple[fx.Node, Rotation]]:
    for attention in program.nodes(ops.mla_attention):
        maker, heads = operand_node(attention, "kv"), operand(attention, "num_heads")
        reason = not_scalable(attention, maker, uses)
        if reason is not None:
            raise NotRotatedError(f"the values of heads, {attention.name}: {reason}")
        consumers = [operand_node(user, name) for user in attention.users for name in READS[user.target]]
        values = _shape(program, consumers[0])[1] // heads
        base_order(values)  # raises if no Hadamard matrix of this size is known
        yield operand_node(maker, "weight"), Rotation(heads=heads, values=values)
        yield from ((consumer, Rotation(columns=heads)) for consumer in consumers)


def _hidden(program: Program, uses: Counter[str]) -> Iterator[tuple[fx.Node, Rotation]]:
    stream = _stream(program)
    size = _size(program, stream)
    base_order(size)
    for node in stream:
        if node.target in WRITES:
            weight = operand_node(node, WRITES[node.target])
            yield (
                _alone(weight, uses),
                Rotation(columns=1) if node.target == ops.embedding else Rotation(heads=1, values=size),
            )
        for norm in node.users:
            if norm.target == ops.rms_norm:
                yield from _after_norm(program, norm, uses)


def _size(program: Program, stream: list[fx.Node]) -> int:
    return _shape(program, operand_node(stream[0], WRITES[ops.embedding]))[1]


def _after_norm(program: Program, norm: fx.Node, uses: Counter[str]) -> Iterator[tuple[fx.Node, Rotation]]:
    if operand(norm, "bias") is not None or not norm.users or not all(reads(user, norm) for user in norm.users):
        raise NotRotatedError(f"{norm.name} has a bias, or not only linears read it")
    (name,) = program.parameters[str(_alone(operand_node(norm, "weight"), uses).target)].names
    for user in norm.users:
        for weight in READS[user.target]:
            # the norm commutes with a rotation only without its weight, which moves into its consumers
            yield _alone(operand_node(user, weight), uses), Rotation(columns=1, norm=name)


def _stream(program: Program) -> list[fx.Node]:
    """Every node whose value is the stream or is added to it, embeddings first."""
    stream = program.nodes(ops.embedding)
    if not stream:
        raise NotRotatedError("the graph has no embedding, where the residual stream begins")
    for node in stream:  # the loop appends to it
        additions = [user for user in node.users if user.target == ADD]
        if node.target not in WRITES:
            additions += _summands(node)
        elif not is_parameter(operand(node, WRITES[node.target])):
            raise NotRotatedError(f"{node.name} adds to the residual stream, but its weight is computed")
        stream += (addition for addition in dict.fromkeys(additions) if addition not in stream)
        for user in node.users:
            if user.target not in (ADD, ops.rms_norm):
                raise NotRotatedError(f"{user.name} reads the residual stream, but is not a norm")
    return stream


def _summands(node: fx.Node) -> list[fx.Node]:
    given = arguments(node)
    plain = given.pop("alpha") == 1
    known = [
        value
        for value in given.values()
        if isinstance(value, fx.Node) and (value.target == ADD or value.target in WRITES)
    ]
    if not plain or len(known) != len(given):
        raise NotRotatedError(f"{node.name} is not a sum of what linears and experts compute")
    return known


def _alone(weight: fx.Node, uses: Counter[str]) -> fx.Node:
    if uses[str(weight.target)] > 1:
        raise NotRotatedError(f"{weight.target} is used twice")
    return weight


def _shape(program: Program, weight: fx.Node) -> tuple[int, int]:
    rows, columns = program.graph.tensor(str(weight.target)).shape
    return rows, columns
