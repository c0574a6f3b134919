"""A program as JSON: the output folder carries its own graph, so reading one back runs no code."""

import json
import math
import operator
import re
from collections.abc import Callable
from keyword import iskeyword
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxquant import ops
from fxquant.dialects import Dialect
from fxquant.errors import FxquantError
from fxquant.kinds import Kind
from fxquant.policy import Rule
from fxquant.program import MtpLayers, Parameter, Program, attach
from fxquant.safetensors_file import DTYPES, NAMES
from fxquant.schemes import ActivationRange, Recipe, Scheme, WeightAlgorithm
from fxquant.shape_rules import ShapeRules

FORMAT = 2
NAMESPACES = (ops.linear.namespace, "aten")
PYTHON = {name: getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")}
SYMBOLS = {"batch": 1009, "sequence": 1013, "past": 1019, "total": 2032}
"""Sizes at which shapes are checked when a program is read back: no model has them, and total = past + sequence."""


IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
PLACE = re.compile(r"[\w.\-]*", re.ASCII)
"""Node names and dotted paths: these become source text of the Ascend module, so nothing else may pass."""


def save_program(program: Program, path: Path) -> None:
    """Write `dump_program(program)`."""
    path.write_text(dump_program(program), encoding="utf-8")


def dump_program(program: Program) -> str:
    """The graph, its parameters, recipes and rules as JSON; one node a line."""
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
            "kept": program.mtp.kept,
            "gate_biases": list(program.mtp.gate_biases),
        },
    }
    head = json.dumps(document, ensure_ascii=False)[:-1]
    body = ",\n".join(json.dumps(node, ensure_ascii=False) for node in nodes)
    return f'{head},\n"nodes": [\n{body}\n]}}\n'


def load_program(path: Path) -> Program:
    """Read what `save_program` wrote, as `parse_program` does."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FxquantError(path, f"cannot be read: {error.strerror}.", "Name a folder that fxquant wrote.") from None
    except UnicodeDecodeError as error:
        raise FxquantError(path, f"not a program of fxquant: {error!r}.", "Compile again.") from None
    return parse_program(text, path)


def parse_program(text: str, path: object) -> Program:
    """The program that `dump_program` wrote as `text`, every shape checked again; `path` is what an error names.

    Raises FxquantError for anything else.
    """
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise FxquantError(path, f"format {document['format']}.", "Compile again with this version.")
        return _program(document)
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise FxquantError(path, f"not a program of fxquant: {error!r}.", "Compile again.") from None


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


def target_name(node: fx.Node) -> str:
    """An operator as `library::name.overload`, a Python operator as `python::name`, another node's target as it is."""
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace not in NAMESPACES:
            raise FxquantError(
                node.name, f"{node.target} is of another library.", "Use torch operators in the forward."
            )
        return f"{node.target.namespace}::{node.target._schema.name.split('::')[1]}.{node.target._overloadname}"
    name = getattr(node.target, "__name__", "")
    if PYTHON.get(name) is not node.target:
        raise FxquantError(node.name, f"{node.target} cannot be stored.", "Use torch operators in the forward.")
    return f"python::{name}"


def encode(value: Any, refer: Callable[[fx.Node], str] = attrgetter("name")) -> Any:
    """Arguments of a call as JSON; `refer` says how other nodes are named."""
    if isinstance(value, fx.Node):
        return {"node": refer(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, dict):
        return {"map": {key: encode(item, refer) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return [encode(item, refer) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FxquantError(repr(value), f"an argument of type {type(value).__name__} cannot be stored.", "Simplify it.")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((key, content),) = value.items()
    if key == "node":
        return nodes[content]
    if key == "dtype":
        return getattr(torch, content)
    return float(content) if key == "float" else {name: _decode(item, nodes) for name, item in content.items()}


def _parameter(program: Program, target: str) -> dict[str, Any]:
    parameter, tensor = program.parameters[target], program.graph.get_buffer(target)
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
    fields |= {"dialect": recipe.dialect.value, "scale_dtype": NAMES[recipe.scale_dtype]}
    if recipe.algorithm is not WeightAlgorithm.MIN_MAX:
        fields["algorithm"] = recipe.algorithm.value
    if recipe.activation:
        observed = recipe.activation
        fields["activation"] = [observed.low, observed.high, NAMES[observed.arithmetic]]
    return fields


def _read_recipe(module: str, fields: dict[str, Any]) -> Recipe:
    fields = dict(fields)
    observed = fields.pop("activation", None)
    activation = ActivationRange(observed[0], observed[1], DTYPES[observed[2]]) if observed else None
    fields |= {
        "scheme": Scheme(fields["scheme"]),
        "modules": tuple(fields["modules"]),
        "dtype": DTYPES[fields["dtype"]],
        "dialect": Dialect(fields["dialect"]),
        "scale_dtype": DTYPES[fields["scale_dtype"]],
        "algorithm": WeightAlgorithm(fields.get("algorithm", WeightAlgorithm.MIN_MAX)),
    }
    return Recipe(module=module, activation=activation, **fields)


def _program(document: dict[str, Any]) -> Program:
    _check_texts(document)
    root, rules = fx.GraphModule(nn.Module(), fx.Graph()), ShapeRules()
    for target, fields in document["parameters"].items():
        attach(root, target, torch.empty(fields["shape"], dtype=DTYPES[fields["dtype"]], device="meta"))
    graph, nodes = fx.Graph(), {}  # type: fx.Graph, dict[str, fx.Node]
    for entry in document["nodes"]:
        args, kwargs = tuple(_decode(entry["args"], nodes)), _decode(entry.get("kwargs", {"map": {}}), nodes)
        node = graph.create_node(entry["op"], _read_target(entry), args, kwargs, name=entry["name"])
        node.name = entry["name"]
        node.meta = {"module": entry.get("module", ""), "block": entry.get("block", "")}
        node.meta |= {"kind": Kind(entry.get("kind", Kind.OTHER)), "val": _value(entry, node, root, rules)}
        nodes[node.name] = node
    root.graph = graph
    return Program(
        graph=root,
        config=document["config"],
        dtype=DTYPES[document["dtype"]],
        parameters={
            target: Parameter(tuple(p["names"]), p["module"], Kind(p["kind"]), p["stacked"])
            for target, p in document["parameters"].items()
        },
        recipes={module: _read_recipe(module, fields) for module, fields in document["recipes"].items()},
        rules={module: Rule.model_validate(rule) for module, rule in document["rules"].items()},
        names=set(nodes),
        mtp=_read_mtp(document["mtp"]),
    )


def _read_mtp(fields: dict[str, Any]) -> MtpLayers:
    recipes = {module: _read_recipe(module, recipe) for module, recipe in fields["recipes"].items()}
    return MtpLayers(tuple(fields["layers"]), recipes, dict(fields["kept"]), tuple(fields["gate_biases"]))


def _check_texts(document: dict[str, Any]) -> None:
    """Refuse names that are not names; raises ValueError."""
    places = [*document["parameters"], *document["recipes"], *document["rules"]]
    for parameter in document["parameters"].values():
        places += [*parameter["names"], parameter["module"]]
    mtp = document["mtp"]
    places += [*mtp["layers"], *mtp["recipes"], *mtp["kept"], *mtp["kept"].values(), *mtp["gate_biases"]]
    for recipe in [*document["recipes"].values(), *mtp["recipes"].values()]:
        places += recipe["modules"]
    for entry in document["nodes"]:
        places += [entry.get("module", ""), entry.get("block", ""), *_strings(entry["args"])]
        places += _strings(entry.get("kwargs"))
        if not IDENTIFIER.fullmatch(entry["name"]) or iskeyword(entry["name"]):
            raise ValueError(f"node name {entry['name']!r}")
    wrong = next((place for place in places if not PLACE.fullmatch(place)), None)
    if wrong is not None:
        raise ValueError(f"name {wrong!r}")


def _strings(value: Any) -> list[str]:
    """Every string, keys included, in a JSON value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *_strings(item))]
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


def _read_target(entry: dict[str, Any]) -> Any:
    if entry["op"] != "call_function":
        return entry["target"]
    namespace, _, rest = entry["target"].partition("::")
    if namespace == "python":
        return PYTHON[rest]
    if namespace not in NAMESPACES:
        raise ValueError(f"operator {entry['target']}")
    name, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _value(entry: dict[str, Any], node: fx.Node, root: nn.Module, rules: ShapeRules) -> Any:
    if node.op == "placeholder":
        shape = [SYMBOLS[size] if isinstance(size, str) else size for size in entry["shape"]]
        return torch.empty(shape, dtype=getattr(torch, entry["dtype"]), device="meta")
    if node.op == "get_attr":
        return root.get_buffer(str(node.target))
    if node.op == "output":
        return None
    return rules.call(node.target, *fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"]))
