"""A process that loads folders with one release of SGLang: cases as JSON from stdin, findings as JSON into a file.

python sglang_process.py FINDINGS PACKAGE BESIDE … < cases.json
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comparison import Graph
from sglang_engine import Loaded, Place, SGLang
from sglang_experts import check_experts
from sglang_linears import ROW_PARALLEL, Rank, check_linear
from torch import Tensor

from fxquant.engine_readers import EngineReader
from fxquant.engines.sglang_npu.reader import open_sglang_npu
from fxquant.errors import FxquantError

NOT_READ = (".weight_scale", ".weight_offset")
"""Of static linears; the engine allocates them, no operator reads them."""


LEFT_TO_THE_MODEL = {"model.embed_tokens.weight", "lm_head.weight"}
"""A draft model shares these with the model it drafts for."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one release does with a folder on some ranks.

    stopped    the engine's own words, "" if it loaded
    wrong      differences from the graph: what it would have served
    skipped    checkpoint tensors that it warned about
    emulated   what our emulation says instead of reading
    differs    differences from our emulation
    compared   number of comparisons with the graph; worst: the largest error over its bound
    """

    stopped: str = ""
    wrong: list[str]
    skipped: list[str]
    emulated: list[str]
    differs: list[str]
    compared: int = 0
    worst: float = 0.0


def find(engine: SGLang, case: dict[str, Any]) -> Finding:
    """All chosen ranks of one case."""
    folder, size, whole = Path(case["folder"]), int(case["ranks"]), case["parallel"] == "ep"
    graph = Graph.of(Path(case["truth"] or folder))
    layer = f"model.layers.{json.loads((folder / 'config.json').read_text())['num_hidden_layers']}"
    reader = experts = None
    emulated: list[str] = []
    try:
        if case["quantized"]:  # else it is served as a float model, which our readers have nothing to do with
            reader = open_sglang_npu(folder, size)
            experts = open_sglang_npu(folder, 1) if whole else reader
            emulated += refused(graph, reader, experts, layer, case["draft"])
    except FxquantError as error:
        emulated.append(str(error))
    ranks, skipped = [], set()
    try:
        for number in _chosen(size):
            place = Place(number, size, whole)
            loaded = engine.load(folder, place, case["draft"], case["quantized"])
            skipped.update(loaded.skipped)
            rank = Rank(place, graph, reader, experts, engine.operators, graph.dtype, layer if case["draft"] else "")
            check_model(rank, loaded, layer)
            ranks.append(rank)
    except Exception as error:  # whatever the engine says
        return Finding(stopped=_words(error), wrong=[], skipped=[], emulated=emulated, differs=[])
    return Finding(
        wrong=[text for rank in ranks for text in rank.by_graph.differences],
        skipped=sorted(skipped),
        emulated=emulated,
        differs=[text for rank in ranks for text in rank.by_emulation.differences],
        compared=sum(rank.by_graph.compared for rank in ranks),
        worst=max((rank.by_graph.worst for rank in ranks), default=0.0),
    )


def refused(graph: Graph, reader: EngineReader, experts: EngineReader, mtp: str, draft: bool) -> list[str]:
    """What the emulation refuses of the modules of the graph, each told once."""
    said: dict[str, str] = {}
    for module in graph.linears(mtp, draft):
        try:
            if ".experts." in module:
                experts.expert_linear(module, module.endswith(ROW_PARALLEL))
            else:
                reader.linear(module, module.endswith(ROW_PARALLEL))
                if group := reader.fused_with(module):
                    reader.check_fused(group)
        except FxquantError as error:
            said.setdefault(str(error).partition(": ")[2], str(error))
    return list(said.values())


def check_model(rank: Rank, loaded: Loaded, mtp: str) -> None:
    """Everything that a rank holds. mtp: path of the multi-token-prediction layer."""
    for name, module in loaded.model.named_modules():
        method = type(getattr(module, "quant_method", None)).__name__
        if method == "ModelSlimLinearMethod":
            check_linear(rank, name, module)
        elif method == "ModelSlimFusedMoEMethod":
            check_experts(rank, name, module)
        elif isinstance(getattr(module, "w_kc", None), Tensor) and f"{name}.kv_b_proj" in rank.graph.recipes:
            assert module.w_kc.is_floating_point(), name
            rank.by_graph.differences.append(
                f"{name}.kv_b_proj: decoding multiplies by its halves in {module.w_kc.dtype}"
            )
    check_floats(rank, loaded)
    own = {module for module in rank.graph.recipes if module.startswith(f"{mtp}.") == bool(rank.draft)}
    for module in sorted(own - rank.seen):
        if not rank.place.whole or ".experts." not in module:
            rank.by_graph.differences.append(f"{module}: not held as quantized")


def check_floats(rank: Rank, loaded: Loaded) -> None:
    """Parameters that are stored under their own name are what is stored; all have been loaded."""
    infos = rank.graph.files.infos
    for name, parameter in loaded.model.named_parameters():
        stored = rank.stored(name)
        module = stored.rpartition(".")[0]
        shared = rank.draft and name in LEFT_TO_THE_MODEL
        if stored in infos and not shared and module not in rank.graph.recipes and "experts." not in stored:
            whole = rank.graph.files.read(stored).to(parameter.dtype)
            if whole.shape != parameter.shape:
                axis = 1 if module.endswith(ROW_PARALLEL) else 0
                whole = whole.chunk(rank.place.size, axis)[rank.place.rank]
            rank.by_graph.equal(name, parameter.data, whole)
    empty = set(loaded.not_loaded) - (LEFT_TO_THE_MODEL if rank.draft else set())
    rank.by_graph.differences += [f"{name}: not loaded" for name in sorted(empty) if not name.endswith(NOT_READ)]


def _chosen(size: int) -> list[int]:
    """The first rank, one in the middle and the last."""
    return sorted({0, size // 2, size - 1})


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def main() -> None:
    """See above."""
    findings, package, *beside = sys.argv[1:]
    engine = SGLang(Path(package), [Path(path) for path in beside])
    found = [asdict(find(engine, case)) for case in json.load(sys.stdin)]
    Path(findings).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
