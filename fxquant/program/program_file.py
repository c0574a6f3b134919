"""Graph file: a program as JSON. The output folder carries its own graph, so reading one back runs no code."""

import json
from pathlib import Path
from typing import Any

from torch import fx

from fxquant.errors import FxquantError
from fxquant.gc_pause import uncollected
from fxquant.inputs.json_file import parse_json, read_bytes
from fxquant.inputs.limits import GRAPH_BYTES
from fxquant.program.arguments import encode
from fxquant.program.builder import build_program
from fxquant.program.operators import target_name
from fxquant.program.program import Program
from fxquant.program.schema import AGAIN, FORMAT, read_fields
from fxquant.schemes.schemes import Recipe, WeightAlgorithm
from fxquant.storage.safetensors import NAMES


def save_program(program: Program, path: Path) -> None:
    """Write `dump_program(program)`."""
    path.write_text(dump_program(program), encoding="utf-8")


def dump_program(program: Program) -> str:
    """The graph, its parameters, recipes and rules as JSON; one node per line."""
    nodes = [_node(node) for node in program.graph.graph.nodes]
    document = {
        "format": FORMAT,
        "dtype": NAMES[program.dtype],
        "config": program.config,
        "parameters": {target: _parameter(program, target) for target in program.parameters},
        "recipes": {module: _recipe(recipe) for module, recipe in program.recipes.items()},
        "rules": {module: rule.model_dump(mode="json") for module, rule in program.rules.items()},
        "mtp": {
            "layers": list(program.mtp.layers),
            "recipes": {module: _recipe(recipe) for module, recipe in program.mtp.recipes.items()},
            "float_tensors": program.mtp.float_tensors,
            "gate_biases": list(program.mtp.gate_biases),
        },
    }
    if program.stream:
        document["rotated_stream"] = program.stream
    head = json.dumps(document, ensure_ascii=False)[:-1]
    body = ",\n".join(json.dumps(node, ensure_ascii=False) for node in nodes)
    return f'{head},\n"nodes": [\n{body}\n]}}\n'


def load_program(path: Path) -> Program:
    """Read what `save_program` wrote, as `parse_program` does."""
    return parse_program(read_bytes(path, GRAPH_BYTES, "Name a folder that fxquant wrote."), path)


def parse_program(text: bytes | str, path: object) -> Program:
    """The program that `dump_program` wrote as `text`, every field and shape checked; `path` is the place of errors.

    No code is run or generated. Raises FxquantError for any other text.
    """
    with uncollected():
        try:
            document = parse_json(text, path, finite=False)  # the config may have NaN in a key that nobody reads
        except FxquantError as error:
            raise FxquantError(path, f"not a program of fxquant: {error.fact}", AGAIN) from None
        fields = read_fields(document, path)
        try:
            return build_program(fields, path)
        except ValueError as error:
            raise FxquantError(path, f"not a program of fxquant: {error}.", AGAIN) from None


def _node(node: fx.Node) -> dict[str, Any]:
    entry = {"name": node.name, "op": node.op, "target": target_name(node), "args": encode(node.args)}
    if node.kwargs:
        entry["kwargs"] = encode(node.kwargs)
    if node.op == "placeholder":
        value = node.meta["val"]
        entry |= {"dtype": str(value.dtype).removeprefix("torch."), "shape": input_shape(node)}
    return entry | {key: str(node.meta[key]) for key in ("module", "kind", "block") if key in node.meta}


def input_shape(node: fx.Node) -> list[int | str]:
    """Shape of an input with its dynamic sizes by name: batch, sequence, past, total."""
    shape = node.meta["val"].shape
    second = {"attention_mask": "total"}.get(node.name, "sequence" if len(shape) == 2 else "past")
    return ["batch", second, *(int(size) for size in shape[2:])]


def _parameter(program: Program, target: str) -> dict[str, Any]:
    parameter, tensor = program.parameters[target], program.graph.tensor(target)
    fields = {"names": list(parameter.names), "module": parameter.module, "kind": parameter.kind.value}
    return fields | {"stacked": parameter.stacked, "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}


def _recipe(recipe: Recipe) -> dict[str, Any]:
    return recipe_arguments(recipe) | {"modules": list(recipe.modules)}


def recipe_arguments(recipe: Recipe) -> dict[str, Any]:
    """A recipe without its modules, for JSON: what decides the bytes of each of them."""
    fields = {
        key: getattr(recipe, key) for key in ("group_size", "out_features", "in_features", "bias", "row_parallel")
    }
    fields |= {"scheme": recipe.scheme.value, "dtype": NAMES[recipe.dtype]}
    fields |= {"weight_format": recipe.weight_format.value, "scale_dtype": NAMES[recipe.scale_dtype]}
    if recipe.algorithm is not WeightAlgorithm.MIN_MAX:
        fields["algorithm"] = recipe.algorithm.value
    if recipe.activation:
        observed = recipe.activation
        fields["activation"] = [observed.low, observed.high, NAMES[observed.arithmetic]]
    return fields
