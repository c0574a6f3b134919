"""Calibration runs what it must, reads each weight once, keeps nothing, and sees what a run of the whole graph sees."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import float_program, meta_model, random_ids
from torch import Tensor, fx
from typer.testing import CliRunner

from fxquant import CompileOptions, FxquantError, compare, compile, ops
from fxquant.calibration.batches import Batch, batched, count_experts
from fxquant.calibration.calibration_file import Calibration
from fxquant.calibration.smoother import Smoother
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.passes import AssignSchemes, Calibrate, PairSmoothing
from fxquant.policy.policy import CalibrationWeights, load_policy
from fxquant.program.linears import PROJECTIONS, linear_sites
from fxquant.program.operands import operand_node
from fxquant.program.program import Program
from fxquant.runtime.execute import Observer, Values, call, of_batch, prefill_inputs
from fxquant.runtime.stream import Prepare, Stream, experts_together
from fxquant.runtime.weight_providers import LazyStack, Read, RoundedWeights, load
from fxquant.tools.main import app
from fxquant.transforms.transforms_file import transform_tensors

PLAIN, M4, FLEX = "deepseek_w4a8_msmodelslim", "deepseek_w4a8_msmodelslim_m4", "deepseek_w4a8"
LAYERS = 4
LAST = f"model.layers.{LAYERS - 1}."


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Checkpoint]) -> Checkpoint:
    """One dense and three expert layers."""
    return tiny(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def documents(checkpoint: Checkpoint) -> list[Tensor]:
    return [random_ids(meta_model(checkpoint), 1, length, length) for length in (24, 9, 17)]


def prepared(checkpoint: Checkpoint, policy: str) -> Program:
    """The float graph with recipes and pairs."""
    loaded, program = load_policy(policy), float_program(checkpoint)
    AssignSchemes(loaded)(program)
    PairSmoothing(loaded)(program)
    return program


def calibrated(checkpoint: Checkpoint, policy: str, documents: list[Tensor], size: int = 2) -> Calibration:
    calibrate = Calibrate(load_policy(policy), checkpoint, lambda: documents, batch_size=size)
    calibrate(prepared(checkpoint, policy))
    assert calibrate.used is not None
    return calibrate.used


def static_inputs(program: Program) -> dict[str, fx.Node]:
    """Module of a static linear → the node it reads."""
    inputs = {}
    for site in linear_sites(program):
        if site.module in program.recipes and program.recipes[site.module].scheme.static:
            inputs[site.module] = operand_node(site.node, "x")
    return inputs


# what it sees


def whole_run(
    program: Program, read: Read, batches: list[Batch], see: Observer, prepare: Prepare
) -> dict[fx.Node, list[Any]]:
    """Every node of the graph, one after the other, each value and weight kept to the end."""
    inputs = [prefill_inputs(program, batch.ids, mask=batch.mask) for batch in batches]
    values: dict[fx.Node, list[Any]] = {}
    places = [node for node in program.graph.graph.nodes if node.op == "placeholder"]
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = [batch[places.index(node)] for batch in inputs]
        elif node.op == "call_function":
            for argument in node.all_input_nodes:
                if argument.op == "get_attr" and argument not in values:
                    weight = load(program, str(argument.target), read)
                    values[argument] = [weight] * len(batches)
            prepare(node, values)
            values[node] = outputs(node, values)
            see(node, values[node], values)
    return values


def outputs(node: fx.Node, values: dict[fx.Node, list[Any]]) -> list[Any]:
    if node.target == ops.moe_experts:
        return experts_together(node, values)
    count = len(values[node.all_input_nodes[0]])
    return [call(node, of_batch(values, index)) for index in range(count)]


@pytest.mark.parametrize("policy", [PLAIN, M4, FLEX])
def test_it_sees_what_a_run_of_the_whole_graph_sees(
    policy: str, checkpoint: Checkpoint, documents: list[Tensor]
) -> None:
    calibration, program = calibrated(checkpoint, policy, documents), prepared(checkpoint, policy)
    batches = batched(documents, 2, 0)

    def real(values: list[Tensor]) -> list[Tensor]:
        return [value[batch.mask != 0] for value, batch in zip(values, batches, strict=True)]

    smoother = Smoother(program, checkpoint, lambda values: torch.cat(real(values)).float())
    experts: dict[str, Tensor] = {}
    inputs_of, ranges = static_inputs(program), {}

    def see(node: fx.Node, values: list[Any], inputs: Values) -> None:
        if not rounded:
            smoother.observe(node, values, inputs)
        if node in inputs_of.values():
            ranges[node] = [(value.min(), value.max()) for value in real(values)]
        if node.target == ops.moe_gate:
            count_experts(experts, node, values, batches)

    read: Read = smoother.checkpoint.read
    rounded = load_policy(policy).calibration_weights is CalibrationWeights.ROUNDED
    if rounded:  # scales are those of float weights, ranges those of rounded ones
        whole_run(program, read, batches, smoother.observe, smoother.prepare)
        read = RoundedWeights(program, read)
    values = whole_run(
        program, read, batches, see, lambda node, inputs: None if rounded else smoother.prepare(node, inputs)
    )
    assert "lm_head" in {node.name for node in values} and set(calibration.ranges) == set(inputs_of)
    for module, (low, high) in calibration.ranges.items():
        assert list(zip(low, high, strict=True)) == ranges[inputs_of[module]], module
    assert calibration.experts.keys() == experts.keys() and len(experts) == LAYERS - 1
    assert all(torch.equal(calibration.experts[gate], counts) for gate, counts in experts.items())
    tensors, expected = transform_tensors(calibration.transforms), transform_tensors(smoother.transforms)
    assert tensors.keys() == expected.keys() and (policy == PLAIN) == (not tensors)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_experts_of_all_batches_together_are_those_of_each(checkpoint: Checkpoint) -> None:
    """Batches of three shapes; the shapes come back."""
    program = float_program(checkpoint)
    node = program.nodes(ops.moe_experts)[0]
    generator = torch.Generator().manual_seed(3)
    stacks = [torch.randn(8, 256, 256, generator=generator) / 16 for _ in range(3)]
    tokens = [torch.randn(shape, generator=generator) for shape in ((2, 3, 256), (4, 256), (1, 1, 256))]
    ids = [torch.randint(8, (*x.shape[:-1], 2), generator=generator) for x in tokens]
    weights = [torch.rand(batch.shape, generator=generator) for batch in ids]
    values = dict(
        zip([operand_node(node, name) for name in ("x", "ids", "weights")], (tokens, ids, weights), strict=True)
    )
    values |= {operand_node(node, name): [stack] * 3 for name, stack in zip(PROJECTIONS, stacks, strict=True)}
    for x, together, own, weight in zip(tokens, experts_together(node, values), ids, weights, strict=True):
        expected = ops.moe_experts(x, own, weight, *stacks)
        # 256 products each in another order, three times one after the other
        assert (
            together.shape == x.shape and (together - expected).abs().max() <= 3 * 256 * 2.0**-24 * expected.abs().max()
        )


# what it reads and runs


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor was read from the checkpoint."""
    counts, original = Counter[str](), Checkpoint.read

    def read(checkpoint: Checkpoint, name: str) -> Tensor:
        counts[name] += 1
        return original(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "read", read)
    return counts


def test_each_tensor_is_read_once(checkpoint: Checkpoint, documents: list[Tensor], reads: Counter[str]) -> None:
    calibrated(checkpoint, PLAIN, documents, size=1)
    read = {name for name in checkpoint.tensors if not name.startswith((LAST, "model.norm", "lm_head"))}
    read |= {name for name in checkpoint.tensors if name.startswith(LAST) and (".mlp." not in name or ".gate." in name)}
    assert reads == dict.fromkeys(read, 1)


def test_smoothing_reads_experts_once_more(
    checkpoint: Checkpoint, documents: list[Tensor], tmp_path: Path, reads: Counter[str]
) -> None:
    """Those that read a smoothed value, for their largest magnitudes."""
    (tmp_path / "policy.yaml").write_text(f"extends: {FLEX}\nsmooth: [{{pair: norm, method: smoothquant}}]")
    calibrated(checkpoint, str(tmp_path / "policy.yaml"), documents, size=1)
    experts = {name: count for name, count in reads.items() if ".experts." in name}
    for name in (name for name in checkpoint.tensors if ".experts." in name):
        behind = name.startswith(LAST)  # no static linear comes after the last layer's experts
        assert experts.get(name, 0) == (0 if behind else 1) + ("down_proj" not in name), name


def test_nothing_runs_behind_what_is_wanted_and_no_cache_is_kept(
    checkpoint: Checkpoint, documents: list[Tensor]
) -> None:
    program, ran, alive = prepared(checkpoint, PLAIN), [], []
    observed = set(static_inputs(program).values())
    inputs = [prefill_inputs(program, ids) for ids in documents]
    stream = Stream(program, checkpoint.read, inputs, observed)
    for block in stream.blocks:
        stream.run(block, lambda node, values, inputs: ran.append(node), lambda amount: None)
        alive.append({node.name for node in stream.values})
    assert [block.name for block in stream.blocks] == ["before", *(f"model.layers.{i}" for i in range(LAYERS))]
    assert ran[-1] in observed and ran[-1].name == f"layers_{LAYERS - 1}_self_attn_mla_attention"
    hidden = [{"embed_tokens"}, *({f"layers_{layer}_add_1"} for layer in range(LAYERS - 1))]
    for layer, names in enumerate(hidden):
        caches = {f"past_{later}" for later in range(layer, LAYERS)}
        assert alive[layer] == names | caches | {"attention_mask", "rope_table_0", "rope_table_1"}
    assert alive[-1] == set()


def test_observers_see_the_inputs_alive(checkpoint: Checkpoint, documents: list[Tensor]) -> None:
    program, seen = prepared(checkpoint, PLAIN), []

    def see(node: fx.Node, values: list[Any], inputs: Any) -> None:
        seen.append(node.target)
        if node.target == ops.moe_experts:
            assert isinstance(inputs[operand_node(node, "gate_proj")][0], LazyStack)
        if node.target == ops.linear:
            again = [
                ops.linear(*arguments) for arguments in zip(*(inputs[argument] for argument in node.args), strict=True)
            ]
            assert all(torch.equal(value, other) for value, other in zip(again, values, strict=True))

    inputs = [prefill_inputs(program, ids) for ids in documents]
    stream = Stream(program, checkpoint.read, inputs, program.nodes(ops.linear))
    for block in stream.blocks:
        stream.run(block, see, lambda amount: None)
    assert {ops.linear, ops.moe_experts} <= set(seen)


# devices


def test_operators_make_their_index_tensors_where_their_inputs_are(checkpoint: Checkpoint) -> None:
    """Whatever torch takes for the default device."""
    program = prepared(checkpoint, M4)
    batches = batched([random_ids(meta_model(checkpoint), 1, 5)], 1, 0)

    def again(node: fx.Node, values: list[Any], inputs: Any) -> None:
        with torch.device("meta"):
            result = outputs(node, inputs)[0]
        for tensor in result if isinstance(result, tuple | list) else (result,):
            assert tensor.device.type == "cpu", node

    read = checkpoint.transformed(Smoother(program, checkpoint, torch.cat).transforms).read
    whole_run(program, read, batches, again, lambda node, inputs: None)


@pytest.mark.parametrize(
    ("device", "fact"),
    [("cuda", "torch finds no CUDA device"), ("npu", "torch_npu is not installed"), ("tpu", "unknown")],
)
def test_devices_that_are_not_there(
    device: str, fact: str, tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("fxquant.runtime.device.find_spec", lambda name: None)
    options = CompileOptions(out=tmp_path / "out", device=device)
    for work in (
        lambda: compile(tiny_folder(), options),
        lambda: compare(tiny_folder(), [PLAIN], tmp_path / "text.txt", options),
        lambda: CliRunner().invoke(app, ["compile", str(tiny_folder()), "--device", device], catch_exceptions=False),
    ):
        with pytest.raises(FxquantError, match=fact) as caught:
            work()
        assert caught.value.place == f"--device {device}" and caught.value.remedy
    assert not list(tmp_path.iterdir())
