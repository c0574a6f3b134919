"""Running a program: all batches at once as one by one, one node's weights in memory, decoding with the cache."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny import float_program, inputs, load_model, meta_model, random_ids, rewritten
from torch import Tensor, fx

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.generation.greedy import greedy
from fxquant.program.program import Program
from fxquant.runtime.execute import Values, cache_inputs, execute, prefill_inputs
from fxquant.runtime.program_runner import ProgramRunner
from fxquant.runtime.weight_providers import Cached, LazyStack, Read, RecipeWeights

Tiny = Callable[..., Checkpoint]
POLICIES = ["float", "deepseek_w4a8", "deepseek_w4a8_per_channel", "deepseek_w8a8"]
LENGTHS = ((1, 7), (3, 4), (2, 1))


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny) -> Checkpoint:
    return tiny()


@pytest.fixture(scope="module")
def batches(checkpoint: Checkpoint) -> list[Tensor]:
    return [random_ids(meta_model(checkpoint), *shape, seed) for seed, shape in enumerate(LENGTHS)]


class Counting:
    """A reader that counts reads by name and knows which of its tensors are alive.

    It gives float32, which a graph takes without a copy.
    """

    def __init__(self, read: Read) -> None:
        self.read, self.reads, self.live, self.most = read, Counter[str](), set[str](), set[str]()

    def __call__(self, name: str) -> Tensor:
        tensor = self.read(name).clone()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        self.reads[name] += 1
        self.live.add(name)
        self.most = max(self.most, set(self.live), key=len)
        weakref.finalize(tensor, self.live.discard, name)
        return tensor


def run(program: Program, read: Read, batches: Sequence[Tensor], **options: Any) -> list[list[Tensor]]:
    return [
        list(outputs) for outputs in execute(program, read, [prefill_inputs(program, b) for b in batches], **options)
    ]


def weights(program: Program, checkpoint: Checkpoint) -> Read:
    return RecipeWeights(program, checkpoint)


# the numbers


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_together_are_the_batches_alone(policy: str, checkpoint: Checkpoint, batches: list[Tensor]) -> None:
    program = rewritten(checkpoint, policy)
    read = weights(program, checkpoint)
    together = run(program, read, batches)
    assert [tuple(outputs[0].shape) for outputs in together] == [(*shape, 128) for shape in LENGTHS]
    for ids, outputs in zip(batches, together, strict=True):
        (alone,) = run(program, read, [ids])
        assert all(torch.equal(x, y) for x, y in zip(outputs, alone, strict=True))


def test_the_float_graph_gives_what_the_module_gives(checkpoint: Checkpoint, batches: list[Tensor]) -> None:
    program, model = float_program(checkpoint), load_model(checkpoint)
    for ids, outputs in zip(batches, run(program, checkpoint.read, batches), strict=True):
        with torch.no_grad():
            logits, caches = model(*inputs(model, ids))
        assert all(torch.equal(x, y) for x, y in zip(outputs, [logits, *caches], strict=True))


def test_no_batches_give_no_outputs(checkpoint: Checkpoint) -> None:
    assert execute(float_program(checkpoint), checkpoint.read, []) == []


def test_the_dtype_is_that_of_weights_and_caches(checkpoint: Checkpoint, batches: list[Tensor]) -> None:
    program = float_program(checkpoint)
    batch = prefill_inputs(program, batches[0], torch.bfloat16)
    dtypes = {}
    (outputs,) = execute(
        program, checkpoint.read, [batch], lambda node, values, inputs: dtypes.update({node.name: values[0]}),
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    assert dtypes["layers_1_mlp_experts"].dtype is torch.bfloat16
    assert dtypes["layers_1_mlp_gate_router_logits"].dtype is torch.float32


# what is read and kept


@pytest.mark.parametrize("policy", ["float", "deepseek_w4a8"])
def test_weights_are_read_once_for_all_batches_and_dropped(
    policy: str, checkpoint: Checkpoint, batches: list[Tensor]
) -> None:
    program = rewritten(checkpoint, policy)
    counting = Counting(weights(program, checkpoint))
    gc.disable()  # only reference counts may free them: a cycle would live until the collector comes
    try:
        run(program, counting, batches)
    finally:
        gc.enable()
    plain = {name for parameter in program.parameters.values() if not parameter.stacked for name in parameter.names}
    assert {name: counting.reads[name] for name in plain} == dict.fromkeys(plain, 1)
    assert not counting.live
    # what one operator reads, of one module: a weight, or input_scale and input_offset, or deq_scale and quant_bias
    assert len(counting.most) == (1 if policy == "float" else 2), counting.most
    assert len({name.rpartition(".")[0] for name in counting.most}) == 1


def routed(program: Program, read: Read, ids: Tensor) -> set[int]:
    """The experts that any token of `ids` chose."""
    selected: set[int] = set()

    def observe(node: fx.Node, values: list[Any], inputs: Values) -> None:
        if node.target == ops.moe_gate:
            selected.update(values[0][0].flatten().tolist())

    run(program, read, [ids], observe=observe)
    return selected


@pytest.mark.parametrize("policy", POLICIES)
def test_only_experts_with_tokens_are_read(policy: str, checkpoint: Checkpoint) -> None:
    """A single token has two experts of eight."""
    program = rewritten(checkpoint, policy)
    ids = random_ids(meta_model(checkpoint), 1, 1)
    selected = routed(program, weights(program, checkpoint), ids)
    assert len(selected) == 2
    counting = Counting(weights(program, checkpoint))
    run(program, counting, [ids])
    prefix = "model.layers.1.mlp.experts."
    experts = Counter(
        int(name.removeprefix(prefix).split(".")[0]) for name in counting.reads if name.startswith(prefix)
    )
    tensors = {"float": 3, "deepseek_w4a8": 9, "deepseek_w4a8_per_channel": 6, "deepseek_w8a8": 6}[policy]
    assert experts == dict.fromkeys(selected, tensors)
    assert {counting.reads[name] for name in counting.reads if name.startswith(prefix)} == {1}


def test_a_lazy_stack_reads_what_is_asked_for() -> None:
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return torch.tensor(float(name))

    stack = LazyStack(("0", "1", "2"), read)
    assert (len(stack), asked) == (3, [])
    assert (stack[2].item(), asked) == (2.0, ["2"])
    assert ([tensor.item() for tensor in stack], asked) == ([0.0, 1.0, 2.0], ["2", "0", "1", "2"])


def test_a_cached_reader_stays_below_its_limit() -> None:
    counting = Counting(lambda name: torch.full((4,), float(name), dtype=torch.bfloat16))
    cached = Cached(counting, 3 * 16)
    for name in "0120130":  # 3 puts out 2, the least recently read
        assert cached(name).tolist() == [float(name)] * 4
    assert counting.reads == {"0": 1, "1": 1, "2": 1, "3": 1}
    cached("2")
    assert counting.reads["2"] == 2
    assert cached("2").dtype is torch.float32


def test_a_tensor_above_the_limit_is_still_read() -> None:
    cached = Cached(lambda name: torch.zeros(100), 16)
    assert cached("a").shape == cached("b").shape == (100,)


# what is known


@pytest.mark.parametrize("policy", ["float", "deepseek_w4a8"])
def test_what_is_known_does_not_run(policy: str, checkpoint: Checkpoint, batches: list[Tensor]) -> None:
    program = rewritten(checkpoint, policy)
    read = weights(program, checkpoint)
    values: dict[fx.Node, list[Any]] = {}
    expected = run(program, read, batches, observe=lambda node, outputs, live: values.update({node: list(outputs)}))
    first = [node for node in values if node.meta["block"] == "model.layers.0"]
    position = list(values).index(first[-1])
    known = {node: values[node] for node in list(values)[: position + 1]}
    ran: list[fx.Node] = []
    counting = Counting(read)
    results = run(program, counting, batches, observe=lambda node, outputs, live: ran.append(node), known=known)
    assert all(torch.equal(x, y) for xs, ys in zip(expected, results, strict=True) for x, y in zip(xs, ys, strict=True))
    assert ran == list(values)[position + 1 :]
    assert not [name for name in counting.reads if name.startswith("model.layers.0.")]


# who watches


def test_observers_see_every_call_once_with_all_batches(checkpoint: Checkpoint, batches: list[Tensor]) -> None:
    program = float_program(checkpoint)
    seen: list[tuple[str, int]] = []
    advanced: list[int] = []
    run(
        program, checkpoint.read, batches, observe=lambda node, values, inputs: seen.append((node.name, len(values))),
        advance=advanced.append,
    )  # fmt: skip
    calls = [node.name for node in program.graph.graph.nodes if node.op == "call_function"]
    assert seen == [(name, len(batches)) for name in calls]
    assert sum(advanced) == len(program.graph.graph.nodes)


# decoding


@pytest.mark.parametrize("policy", ["float", "deepseek_w4a8", "deepseek_w4a8_dynamic"])
def test_decoding_with_the_cache_is_prefill_of_the_whole(policy: str, checkpoint: Checkpoint) -> None:
    program = rewritten(checkpoint, policy)
    read = Cached(weights(program, checkpoint))
    prompt = random_ids(meta_model(checkpoint), 1, 6)[0].tolist()
    ids, steps = list(prompt), list(greedy(ProgramRunner(program, read), [prompt], 5, 128))
    for logits in steps:
        ((whole, *_),) = run(program, read, [torch.tensor([ids])])
        assert logits.shape == (1, 128) and int(logits.argmax()) == int(whole[0, -1].argmax())
        # sums over hidden features in another order, 2**-24 each; no activation lies on a rounding boundary here
        assert (logits - whole[0, -1]).abs().max() <= 256 * 2.0**-24 * whole.abs().max()
        ids.append(int(logits.argmax()))
    assert len(ids) == len(prompt) + 5


def test_no_steps_yield_nothing(checkpoint: Checkpoint) -> None:
    runner = ProgramRunner(float_program(checkpoint), checkpoint.read)
    assert list(greedy(runner, [[1, 2, 3]], 0, 128)) == []


def test_prefill_inputs_are_unpadded_and_uncached(checkpoint: Checkpoint) -> None:
    program = float_program(checkpoint)
    ids, mask, positions, *caches = prefill_inputs(program, torch.tensor([[5, 6, 7], [8, 9, 10]]))
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [8, 9, 10]], [[1, 1, 1]] * 2)
    assert positions.tolist() == [[0, 1, 2]] * 2
    assert [tuple(cache.shape) for cache in caches] == [(2, 0, 40)] * 2
    assert [node.name for node in cache_inputs(program)] == ["past_0", "past_1"]
