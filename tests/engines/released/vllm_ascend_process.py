"""One release in a process of its own: `python vllm_ascend_process.py RELEASE < requests.json > answers.json`.

A request is {"folder", "graph", "ranks", "rank", "expert_parallel", "mtp", "compute"}; `graph` is the folder whose
graph decides, another than `folder` where that is damaged. An answer is [verdict, words].
"""

import contextlib
import json
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import computed
import emulated
import held
import torch
from graph_parts import GraphParts
from outcome import Verdict
from vllm_ascend_engine import VllmAscend
from vllm_world import Place

MOST_WORDS = 200


def main() -> None:
    """Answers in the order of the requests."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        engine = VllmAscend(sys.argv[1])
        answers = [answer(engine, request) for request in json.load(sys.stdin)]
    json.dump(answers, sys.stdout)


def answer(engine: VllmAscend, request: dict[str, Any]) -> tuple[str, str]:
    """The verdict on one rank, and the words for it."""
    place = Place(request["ranks"], request["rank"], request["expert_parallel"])
    try:
        model = engine.load(Path(request["folder"]), place, request["mtp"])
    except ModuleNotFoundError:  # ours to stand in for
        raise
    except Exception as error:  # whatever an engine raises
        if isinstance(error, AttributeError) and "'NoneType' object" in str(error):  # a setting that we don't have
            raise
        return Verdict.REFUSED.value, f"{type(error).__name__}: {' '.join(str(error).split())[:MOST_WORDS]}"
    graph = _graph(request["graph"])
    found = list(held.differences(model, graph, place))
    program = graph.program
    quantized = program.mtp.recipes if request["mtp"] else program.recipes  # of float layers nothing is computed
    if found or not (request["compute"] and quantized):
        return (Verdict.WRONG if found else Verdict.LOADED).value, found[0] if found else ""
    try:
        found = list(computed.differences(model, graph, place, graph.program.dtype))
        if not found and not request["mtp"] and request["folder"] == request["graph"]:
            found = list(emulated.differences(model, graph, Path(request["folder"]), place, graph.program.dtype))
    except ValueError as error:  # our operators take what the device's are documented to take
        return Verdict.LOADED.value, f"operator refuses: {error}"
    return (Verdict.WRONG if found else Verdict.EQUAL).value, found[0] if found else ""


@cache
def _graph(folder: str) -> GraphParts:
    return GraphParts(Path(folder))


if __name__ == "__main__":
    main()
