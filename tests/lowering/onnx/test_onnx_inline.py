"""Inlined ONNX models: plain nodes that compute what the local functions do, bit for bit, and are checked alike."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx_graphs import Emitted, blocks, cached_inputs, emit, node_values, quantized
from slowness import others_slow

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.lowering.onnx.builder import CONTRIB, DOMAIN
from fxquant.lowering.onnx.extract import operator_session
from fxquant.lowering.onnx.required import stored_form
from fxquant.lowering.onnx.runner import OnnxRunner

POLICIES = ("deepseek_w4a8", "deepseek_w8a8", "deepseek_w4a8_shared_w4", "float")
IDS = torch.arange(14).view(2, 7)


@pytest.mark.parametrize("profile", OnnxProfile)
@pytest.mark.parametrize("policy", others_slow(POLICIES, ["deepseek_w4a8"]))
def test_an_inlined_model(tiny: Callable[..., Checkpoint], tmp_path: Path, policy: str, profile: OnnxProfile):
    checkpoint = tiny()
    program, results = quantized(checkpoint, policy), []
    for form in (OnnxForm(profile), OnnxForm(profile, inline=True)):
        folder = tmp_path / str(form.inline)
        folder.mkdir()
        emitted = emit(program, checkpoint, folder, form)
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        assert bool(model.functions) != form.inline and stored_form(folder) == form
        domains = {""} | ({CONTRIB} if profile.contrib else set()) | (set() if form.inline else {DOMAIN})
        assert {node.domain for node in model.graph.node} <= domains
        assert {opset.domain for opset in model.opset_import} == domains
        onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
        runner = OnnxRunner(folder)
        logits, caches = runner.prefill(IDS)
        step, _ = runner(torch.tensor([[3], [4]]), torch.ones(2, 8).long(), torch.full((2, 1), 7), caches)
        results.append((logits, step, _operators(emitted)))
    (logits, step, values), (own_logits, own_step, own_values) = results
    assert own_logits.equal(logits) and own_step.equal(step) and own_values.keys() == values.keys()
    assert [name for name, value in own_values.items() if not value.equal(values[name])] == []


def _operators(emitted: Emitted) -> dict[str, torch.Tensor]:
    """What each operator makes of the values that the fx graph feeds it."""
    named = {node.name: value for node, value in node_values(emitted, cached_inputs(emitted.program)).items()}
    results = {}
    for nodes in blocks(emitted.program).values():
        session = operator_session(emitted.folder, [node.name for node in nodes])
        results |= session(session.feeds(named))
    return results
