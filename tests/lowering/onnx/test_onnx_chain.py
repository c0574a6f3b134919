"""A chain of blocks is the whole model, with the weights of one block in memory at a time."""

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
from fxquant.lowering.onnx import chain
from fxquant.lowering.onnx.chain import BlockChain
from fxquant.lowering.onnx.extract import outside_reads

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
