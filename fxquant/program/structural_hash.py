"""Structural hash of a graph: equal for graphs that make the same calls on the same parameters."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import fx

from fxquant.program.arguments import encode
from fxquant.program.operators import target_name
from fxquant.program.program import Program
from fxquant.program.program_file import input_shape


def structural_hash(program: Program) -> str:
    """sha256, in hex, over inputs, parameters and calls.

    Of a call, its operator, arguments (by the position of the call that computed them), module, kind and block count;
    of a parameter, its names in the checkpoint, shape, dtype and module; of an input, its shape, dynamic sizes by name.
    Names of nodes and the order of parameters in the graph do not count.
    """
    digest = hashlib.sha256()
    for line in structure(program):
        digest.update(line.text.encode() + b"\n")
    return digest.hexdigest()


class Line(NamedTuple):
    """What counts of one input or call: all of it as text, its module ("" outside of them), and its operator."""

    text: str
    module: str
    operator: str


def structure(program: Program) -> Iterator[Line]:
    """Inputs and calls in graph order: graphs with equal texts make the same calls on the same parameters."""
    positions: dict[fx.Node, str] = {}
    inputs = calls = 0
    for node in program.graph.graph.nodes:
        if node.op == "get_attr":
            # written out where a call reads it, so that its own position does not count
            positions[node] = _parameter(program, str(node.target))
            continue
        if node.op == "placeholder":
            positions[node], inputs = f"input {inputs}", inputs + 1
            yield Line(f"{positions[node]} {node.meta['val'].dtype} {input_shape(node)}", "", "an input")
            continue
        arguments = encode((node.args, dict(sorted(node.kwargs.items()))), positions.__getitem__)
        positions[node], calls = f"call {calls}", calls + 1
        place = [str(node.meta.get(key, "")) for key in ("module", "kind", "block")]
        name = target_name(node)
        text = f"{node.op} {name} {arguments} {place if node.op == 'call_function' else ''}"
        yield Line(text, place[0], "the output" if node.op == "output" else name)


def _parameter(program: Program, target: str) -> str:
    parameter, tensor = program.parameters[target], program.graph.tensor(target)
    what = (parameter.names, parameter.module, str(parameter.kind), tuple(tensor.shape), str(tensor.dtype))
    return f"parameter {what}"
