"""The ONNX profile `qdq`: the integers of the profile `integer` in QuantizeLinear, DequantizeLinear and MatMul."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx_calls import UNIT, assert_equal, both, floats, int8, integers
from onnx_graphs import cached_inputs, emit, quantized
from slowness import POLICIES as FEW_POLICIES
from slowness import others_slow
from tiny import float_program
from torch import Tensor

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.errors import FxquantError
from fxquant.kernels.activation import fused_parameters
from fxquant.lowering.onnx.required import stored_form
from fxquant.lowering.onnx.runner import OnnxRunner, session_options
from fxquant.policy.policy import shipped_policies

STANDARD = (OnnxProfile.QDQ, OnnxProfile.INTEGER)


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Those of branches included."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *(node for part in inner for node in all_nodes(part))]


def optimized(folder: Path, file: Path) -> list[str]:
    """Types of the nodes that onnxruntime runs."""
    options = session_options()
    options.optimized_model_filepath = str(file)
    onnxruntime.InferenceSession(folder / "model.onnx", options)
    return [node.op_type for node in all_nodes(onnx.load(file, load_external_data=False).graph)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_static_linear_rounds_as_its_steps_but_at_ties(tmp_path: Path, dtype: torch.dtype, biased: bool):
    x, weight = floats(2, 9, 64, scale=3), int8(24, 64, seed=1)
    scale, offset = torch.tensor([0.031]).to(dtype), torch.tensor([-7.0]).to(dtype)
    weight_scale, bias = floats(24, seed=2).abs() / 100, floats(24, seed=3) if biased else None
    sums = weight.long().sum(1)
    deq_scale, quant_bias = fused_parameters(sums, weight_scale.unsqueeze(-1), scale, offset, bias)
    arguments = (x, weight, scale, offset, deq_scale, quant_bias.int(), biased)
    stored = ("weight", "input_scale", "input_offset", "deq_scale", "quant_bias")
    ((emitted, reference),) = both(tmp_path, ops.static_linear, *arguments, stored=stored)
    codes = ops.quantize_static(x, scale, offset).double()
    real = x.double() / scale.double() + offset.double()
    ties = ((real - real.floor()) - 0.5).abs() <= 8 * UNIT * (real.abs() + 16)
    assert not ties.any(), "another seed: the rest says nothing of ties"
    # the scale is a quotient and a product away from deq_scale, then two products and a sum are rounded
    magnitude = ((codes - offset.double()) @ weight.double().T).abs() + quant_bias.double().abs()
    assert ((emitted - reference).abs() <= 16 * UNIT * magnitude * deq_scale.double()).all()


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_per_token_linear_is_exact_where_onnxruntime_fuses_it(tmp_path: Path, shape: tuple[int, ...], biased: bool):
    x = torch.cat((int8(*shape, 96), torch.full((*shape[:-1], 1, 96), 127), torch.full((*shape[:-1], 1, 96), -127)), -2)
    bias = floats(24, seed=4) if biased else None
    rest = (floats(*x.shape[:-1], 1, seed=5).abs(), int8(24, 96, seed=1), floats(24, 1, seed=3).abs(), bias)
    assert_equal(
        both(tmp_path, ops.per_token_linear, x.to(torch.int8), *rest, stored=("weight", "weight_scale", "bias"))
    )


@pytest.mark.parametrize("group_size", [0, 32, 96])
def test_per_token_int4_linear_reads_the_packed_bytes(tmp_path: Path, group_size: int):
    second = integers(1, 16, 24, 96 // group_size, dtype=torch.int32).float() if group_size else None
    arguments = (int8(5, 96), floats(5, 1).abs(), int8(12, 96, seed=1), floats(24, 1, seed=3).abs(), second)
    stored = ("weight", "weight_scale", "weight_scale_second")
    assert_equal(both(tmp_path, ops.per_token_int4_linear, *arguments, stored=stored))


@pytest.fixture(scope="module")
def graphs(tiny: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """`graphs(policy, **checkpoint options)`: the folder of each profile."""

    @functools.cache
    def make(policy: str, **options: Any) -> dict[str, Path]:
        program, checkpoint = quantized(tiny(**options), policy), tiny(**options)
        folders = {profile: tmp_path_factory.mktemp(profile) for profile in STANDARD}
        for profile, folder in folders.items():
            emit(program, checkpoint, folder, OnnxForm(profile))
        return folders

    return make


def results(folder: Path, inputs: list[Tensor]) -> list[Tensor]:
    ids, mask, positions, *past = inputs
    logits, presents = OnnxRunner(folder)(ids, mask, positions, past)
    return [logits, *presents]


@pytest.mark.parametrize("policy", others_slow(shipped_policies(), FEW_POLICIES))
def test_the_whole_graph_gives_what_the_integer_profile_gives(
    graphs: Callable[..., dict[str, Path]], checkpoint: Checkpoint, policy: str
):
    folders = graphs(policy)
    inputs = cached_inputs(float_program(checkpoint))
    pairs = list(zip(*(results(folders[profile], inputs) for profile in STANDARD), strict=True))
    for qdq, integer in pairs:
        # a static scale is two roundings away; no code moves here, seeds are fixed
        assert torch.allclose(qdq, integer, rtol=1e-4, atol=1e-4)
    if policy == "deepseek_w4a8_dynamic":  # nothing static
        assert all(torch.equal(*pair) for pair in pairs)


def test_the_graph_is_of_standard_operators_and_onnxruntime_fuses_them(
    graphs: Callable[..., dict[str, Path]], tmp_path: Path
):
    folder = graphs("deepseek_w4a8")[OnnxProfile.QDQ]
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    bodies = [node for function in model.functions for node in function.node]
    assert {node.domain for node in (*bodies, *all_nodes(model.graph))} == {"", "fxquant"}
    types = {node.op_type for node in bodies}
    assert {"QuantizeLinear", "DequantizeLinear"} <= types and "MatMulInteger" not in types
    assert stored_form(folder).profile is OnnxProfile.QDQ
    ran = optimized(folder, tmp_path / "optimized.onnx")
    assert "DequantizeLinear" not in ran and ran.count("MatMulIntegerToFloat") == len(linears(graphs))


def linears(graphs: Callable[..., dict[str, Path]]) -> list[str]:
    """Products of integers in the profile `integer`, those of every expert included."""
    model = onnx.load(graphs("deepseek_w4a8")[OnnxProfile.INTEGER] / "model.onnx", load_external_data=False)
    functions = {function.name: list(function.node) for function in model.functions}

    def products(nodes: list[onnx.NodeProto]) -> list[str]:
        inner = [name for node in nodes for name in products(functions.get(node.op_type, []))]
        return inner + [node.op_type for node in nodes if node.op_type == "MatMulInteger"]

    return products(all_nodes(model.graph))


def test_the_profile_in_the_metadata_must_be_known(graphs: Callable[..., dict[str, Path]], tmp_path: Path):
    model = onnx.load(graphs("deepseek_w4a8")[OnnxProfile.QDQ] / "model.onnx", load_external_data=False)
    next(prop for prop in model.metadata_props if prop.key == "profile").value = "fastest"
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FxquantError, match="the profile 'fastest', which fxquant does not know"):
        stored_form(tmp_path)
