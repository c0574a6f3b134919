"""Graph files of an attacker: each ran code, or used all memory, when graphs were compiled to text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxquant.lowering.output_folder.manifest import GRAPH, MANIFEST
from fxquant.lowering.weights.digests import file_digest

Attack = Callable[[dict[str, Any], str], None]
"""Changes the document; the second is a command of the shell that its code would run."""


def last_input(document: dict[str, Any]) -> dict[str, Any]:
    return [node for node in document["nodes"] if node["op"] == "placeholder"][-1]


def first_call(document: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in document["nodes"] if node["op"] == "call_function")


def placeholder_target(document: dict[str, Any], command: str) -> None:
    last_input(document)["target"] += f"=__import__('os').system({command!r})"


def placeholder_name(document: dict[str, Any], command: str) -> None:
    last_input(document)["name"] = last_input(document)["target"] = f"past_1=__import__('os').system({command!r})"


def output_target(document: dict[str, Any], command: str) -> None:
    document["nodes"][-1]["target"] = f"__import__('os').system({command!r})"


def attribute_target(document: dict[str, Any], command: str) -> None:
    document["nodes"][0]["target"] = f"x, __import__('os').system({command!r})"


def attribute_chain(document: dict[str, Any], command: str) -> None:
    """`getattr(torch.ops.aten, …)` of free names leads to any object of Python."""
    call = {"op": "call_function", "module": "", "kind": "other", "block": ""}
    nodes = [
        call | {"name": "c", "target": "aten::__init__.__getattribute__", "args": ["__globals__"]},
        call | {"name": "d", "target": "python::getitem", "args": [{"node": "c"}, "sys"]},
        call | {"name": "e", "target": "aten::__setattr__.__call__", "args": ["x", {"node": "d"}]},
        call | {"name": "f", "target": "aten::x.__getattribute__", "args": [command]},
    ]
    document["nodes"][-1:-1] = nodes


def chr_of_a_number(document: dict[str, Any], command: str) -> None:
    document["nodes"].insert(-1, first_call(document) | {"name": "c", "target": "aten::chr", "args": [65]})


def a_word_times_a_number(document: dict[str, Any], command: str) -> None:
    """A string of 100 GB."""
    times = {"name": "c", "target": "python::mul", "args": ["a", 10**11]}
    document["nodes"].insert(-1, first_call(document) | times)


def a_number_to_no_end(document: dict[str, Any], command: str) -> None:
    """x * x, sixty times."""
    call, nodes = first_call(document), []
    for number in range(60):
        last = {"node": f"c_{number - 1}"} if number else 10**9
        nodes.append(call | {"name": f"c_{number}", "target": "python::mul", "args": [last, last]})
    document["nodes"][-1:-1] = nodes


def a_terabyte(document: dict[str, Any], command: str) -> None:
    ones = {"name": "c", "target": "aten::ones.default", "args": [[10**12]]}
    document["nodes"].insert(-1, first_call(document) | ones)


def a_billion_pieces(document: dict[str, Any], command: str) -> None:
    call = first_call(document)
    nodes = [
        call | {"name": "c", "target": "aten::ones.default", "args": [[10**8]]},
        call | {"name": "d", "target": "aten::unbind.int", "args": [{"node": "c"}]},
    ]
    document["nodes"][-1:-1] = nodes


def a_tensor_for_sizes(document: dict[str, Any], command: str) -> None:
    """torch takes it apart, element by element, before it says that it is no list of numbers."""
    call = first_call(document)
    nodes = [
        call | {"name": "c", "target": "aten::ones.default", "args": [[10**8]]},
        call | {"name": "d", "target": "aten::full.default", "args": [{"node": "c"}, 1]},
    ]
    document["nodes"][-1:-1] = nodes


def growth(document: dict[str, Any], command: str) -> None:
    """The sequence to the sixth power: small for twelve tokens."""
    call, size = first_call(document), {"node": "s"}
    nodes = [
        call | {"name": "s", "target": "aten::sym_size.int", "args": [{"node": "input_ids"}, 1]},
        call | {"name": "c", "target": "aten::ones.default", "args": [[size] * 6]},
    ]
    document["nodes"][-1:-1] = nodes


ATTACKS = [
    placeholder_target, placeholder_name, output_target, attribute_target, attribute_chain, chr_of_a_number,
    a_word_times_a_number, a_number_to_no_end, a_terabyte, a_billion_pieces, a_tensor_for_sizes,
    growth,
]  # fmt: skip


def attacked(compiled: Path, folder: Path, attack: Attack, signed: bool = True) -> tuple[Path, Path]:
    """A copy of the output with a spoiled graph, and the file that its code would make.

    `signed`: the manifest has the size and digest of the spoiled graph.
    """
    out, touched = folder / "out", folder / "made"
    shutil.copytree(compiled, out)
    document = json.loads((out / GRAPH).read_text())
    attack(document, f"touch {touched}")
    (out / GRAPH).write_text(json.dumps(document))
    if signed:
        manifest = json.loads((out / MANIFEST).read_text())
        manifest["files"][GRAPH] = (out / GRAPH).stat().st_size
        manifest["digests"][GRAPH] = file_digest(out / GRAPH)
        (out / MANIFEST).write_text(json.dumps(manifest))
    return out, touched
