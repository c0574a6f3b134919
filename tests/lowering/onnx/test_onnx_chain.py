"""A chain of blocks is the whole model, with the weights of one block in memory at a time."""

import functools
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx_graphs import blocks, cached_inputs, emit, quantized
from slowness import others_slow

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.lowering.onnx import chain, extract
from fxquant.lowering.onnx.chain import BlockChain
from fxquant.lowering.onnx.extract import outside_reads
from fxquant.lowering.onnx.last_logits import KEEP_ALL
from fxquant.lowering.onnx.runner import OnnxRunner
from fxquant.program.operands import operand_node

FORMS = [*map(OnnxForm, OnnxProfile), OnnxForm(inline=True)]
GRAPHS = [(policy, form) for policy in ("deepseek_w4a8", "deepseek_w8a8", "float") for form in FORMS]
FEW = [("deepseek_w4a8", form) for form in FORMS]


@pytest.mark.parametrize(("policy", "form"), others_slow(GRAPHS, FEW), ids=str)
def test_a_chain_of_blocks_is_the_whole_model(
    tiny: Callable[..., Checkpoint], tmp_path: Path, policy: str, form: OnnxForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    emitted = emit(quantized(tiny(), policy), tiny(), tmp_path, form)
    program, loaded = emitted.program, list[set[str]]()

    def load(part: onnx.ModelProto, folder: Path) -> onnxruntime.InferenceSession:
        loaded.append({tensor.name for tensor in part.graph.initializer})
        return load_session(part, folder)

    load_session = chain.load_session
    monkeypatch.setattr(chain, "load_session", load)
    inputs, by_name = cached_inputs(program), blocks(program)
    steps = BlockChain(tmp_path, {block: [node.name for node in nodes] for block, nodes in by_name.items()})
    values = dict(
        zip((node.name for node in program.graph.graph.nodes if node.op == "placeholder"), inputs, strict=True)
    )
    last = list(by_name)[-1]
    results = [steps.run(block, values, [program.graph.results[0].name] if block == last else []) for block in by_name]
    (logits,) = results[-1].values()
    assert torch.equal(logits, emitted.runner(*inputs[:3], inputs[3:])[0])
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}.intersection(outside_reads(model.graph.node))
    assert set().union(*loaded) == weights and sum(map(len, loaded)) == len(weights)
    assert len(loaded) == len(by_name) == 4


@pytest.mark.parametrize("form", [OnnxForm(), OnnxForm(last_logits=True), OnnxForm(inline=True)], ids=str)
def test_a_large_head_runs_by_rows(
    tiny: Callable[..., Checkpoint], tmp_path: Path, form: OnnxForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks that the rows do not fill; never in a session with another weight, or whole."""
    emitted = emit(quantized(tiny(), "deepseek_w4a8"), tiny(), tmp_path, form)
    program, rows = emitted.program, list[int]()
    head = program.graph.results[0]
    weight = program.parameter(operand_node(head, "weight")).names[0]

    def load(part: onnx.ModelProto, folder: Path) -> onnxruntime.InferenceSession:
        held = {tensor.name: tensor.dims[0] for tensor in part.graph.initializer}
        if weight in held:
            assert len(held) == 1
            rows.append(held[weight])
        return load_session(part, folder)

    load_session = extract.load_session
    monkeypatch.setattr(extract, "load_session", load)
    monkeypatch.setattr(chain, "load_session", load)
    monkeypatch.setattr(extract, "row_sessions", functools.partial(extract.row_sessions, count=50))
    inputs, by_name = cached_inputs(program), blocks(program)
    names = {block: [node.name for node in nodes] for block, nodes in by_name.items()}
    steps = BlockChain(tmp_path, names, {head.name: weight})
    values = KEEP_ALL | dict(
        zip((node.name for node in program.graph.graph.nodes if node.op == "placeholder"), inputs, strict=True)
    )
    for block in names:
        results = steps.run(block, values, {head.name}.intersection(names[block]))
    expected, _ = OnnxRunner(tmp_path)(*inputs[:3], inputs[3:])
    assert rows == [50, 50, 28] and torch.equal(results[head.name], expected)
