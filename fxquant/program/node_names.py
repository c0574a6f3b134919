"""Node names that say where a node comes from: `layers_3_self_attn_q_a_proj`, `layers_3_mlp_swiglu`."""

import re
from keyword import iskeyword

from torch import fx

from fxquant.program.operands import item_of


def name_nodes(graph: fx.Graph) -> set[str]:
    """Rename calls and parameters; inputs keep the names by which callers pass them. → names in use."""
    names = {node.name for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        if node.op == "call_function":
            rename(names, node, _call_name(node))
        elif node.op == "get_attr":
            rename(names, node, identifier(str(node.target)))
    return names


def rename(names: set[str], node: fx.Node, name: str) -> None:
    """Name `node` `name`, or `name_1`, `name_2`, … if that is taken; `names` are those in use."""
    candidate, count = name, 0
    while candidate in names:
        count += 1
        candidate = f"{name}_{count}"
    names.add(candidate)
    node.name = candidate


NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def is_name(text: str) -> bool:
    """Whether a node may have this name: it becomes a variable of the Ascend module."""
    return bool(NAME.fullmatch(text)) and not iskeyword(text)


def identifier(path: str) -> str:
    """A dotted path as a Python identifier, without the leading `model.` that every path shares."""
    return re.sub(r"\W", "_", path.removeprefix("model.")) or "value"


def operator_name(node: fx.Node) -> str:
    """ "rms_norm" for fxq::rms_norm, "add" for aten::add.Tensor."""
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    return str(name).strip("_")


def _call_name(node: fx.Node) -> str:
    call, index = item_of(node)
    if index is not None:
        return f"{call.name}_{index}"
    module, operator = node.meta["module"], operator_name(node)
    own = module.rpartition(".")[2]
    if not module:
        return f"{operator}_" if iskeyword(operator) else operator
    leaf = operator in ("linear", "rms_norm", "embedding", "moe_gate", "moe_experts") and own
    return identifier(module) if leaf else identifier(f"{module}.{operator}")
