"""Draw one layer with experts from a model.onnx: the main graph, the branch of an expert, and what it calls.

python docs/draw_onnx_layer.py FOLDER IMAGE
"""

import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import networkx
import onnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from onnx import GraphProto, NodeProto

LAYER = "layers_3_"
PARTS = tuple(LAYER + part for part in ("post_attention_layernorm", "mlp", "add_1"))
LINE = 40
"""Characters."""
COLOURS = {"": "#eceff4", "fxquant": "#d7e6f7"}
"""Of standard operators, and of calls of local functions."""


@dataclass(frozen=True)
class Panel:
    """Nodes to draw, without constants.

    cut    what all of their names begin with
    given  tensors that they read beside each other's: weights, or inputs of the function
    """

    title: str
    nodes: list[NodeProto]
    cut: str
    given: frozenset[str]


def main(folder: Path, image: Path) -> None:
    """Save the picture; the same model gives the same bytes."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    parts = panels(model)
    with matplotlib.rc_context({"svg.hashsalt": "fxquant", "svg.fonttype": "none", "font.size": 7}):
        figure = Figure(figsize=(16, 11), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(10, 9))
        axes = [left.subplots(), *right.subplots(2, 1, height_ratios=(1, 3))]
        for one, panel in zip(axes, parts, strict=True):
            draw(one, panel)
        figure.savefig(image, metadata={"Date": None})


def panels(model: onnx.ModelProto) -> list[Panel]:
    """The layer in the main graph, the innermost branch of its first expert, and the function called there."""
    layer = [node for node in model.graph.node if node.name.startswith(PARTS)]
    branch = innermost(next(node for node in layer if node.op_type == "If"))
    call = next(node for node in branch.node if node.domain)
    function = next(function for function in model.functions if function.name == call.op_type)
    weights = frozenset(tensor.name for tensor in model.graph.initializer)
    place = call.name.rpartition("/")[0] + "/"
    return [
        Panel(f"main graph, {LAYER}…", plain(layer), LAYER, weights),
        Panel(f"branch {place}…, if the expert has rows", plain(branch.node), place, weights),
        Panel(f"function {function.name}, once for all experts", plain(function.node), "", frozenset(function.input)),
    ]


def innermost(node: NodeProto) -> GraphProto:
    """The branch without another `If` in it, by the first at each level."""
    branch = next(attribute.g for attribute in node.attribute if attribute.name == "then_branch")
    inner = next((each for each in branch.node if each.op_type == "If"), None)
    return branch if inner is None else innermost(inner)


def plain(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """All but constants."""
    return [node for node in nodes if node.op_type != "Constant"]


def draw(axes: Axes, panel: Panel) -> None:
    """A row for each step from the inputs."""
    makers = {output: index for index, node in enumerate(panel.nodes) for output in node.output}
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(panel.nodes)))
    graph.add_edges_from(
        (makers[name], index) for index, node in enumerate(panel.nodes) for name in _reads(node, makers)
    )
    places = placed(graph)
    boxes = []
    for index, node in enumerate(panel.nodes):
        name = node.name.removeprefix(panel.cut)
        lines = [node.op_type, *([name] if name != node.op_type else []), *_given(node, panel.given)]
        box = {"boxstyle": "round", "fc": COLOURS.get(node.domain, "white"), "ec": "#7a869a", "lw": 0.6}
        text = axes.text(
            *places[index], "\n".join(lines), ha="center", va="center", bbox=box, linespacing=1.3, zorder=3
        )
        boxes.append(text.get_bbox_patch())
    for start, end in graph.edges:
        arrow = {"arrowstyle": "-|>", "color": "#7a869a", "lw": 0.7, "shrinkA": 0, "shrinkB": 1}
        arrow |= {"patchA": boxes[start], "patchB": boxes[end]}
        axes.annotate("", places[end], places[start], arrowprops=arrow, zorder=2)
    across, down = zip(*places.values(), strict=True)
    axes.set(title=panel.title, xlim=(min(across) - 0.6, max(across) + 0.6), ylim=(min(down) - 0.5, max(down) + 0.5))
    axes.axis("off")


def _reads(node: NodeProto, makers: dict[str, int]) -> list[str]:
    """Values of the panel that a node and its branches read, each once."""
    inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    names = [*node.input, *(name for graph in inner for each in graph.node for name in _reads(each, makers))]
    return [name for name in dict.fromkeys(names) if name in makers]


def _given(node: NodeProto, given: frozenset[str]) -> list[str]:
    """Weights and inputs that a node reads, by the last part of their names, some of them a line."""
    names = [name.rpartition(".")[2] for name in node.input if name in given]
    counted = [f"{names.count(name)} {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]
    return textwrap.wrap(", ".join(counted), LINE)


def placed(graph: networkx.DiGraph) -> dict[int, tuple[float, float]]:
    """Each node just above the first that reads it, near the middle of what it reads."""
    places: dict[int, tuple[float, float]] = {}
    generations = list(networkx.topological_generations(graph.reverse()))
    for row, generation in enumerate(generations[::-1]):
        wanted = {node: _middle([places[parent][0] for parent in graph.predecessors(node)]) for node in generation}
        ordered = sorted(generation, key=lambda node: (wanted[node], node))
        middle = _middle(list(wanted.values())) - (len(ordered) - 1) / 2
        places |= {node: (middle + place, -float(row)) for place, node in enumerate(ordered)}
    return places


def _middle(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
