"""Smoothing: pairs found in the graph, scales by their formulas, the same function, and what outputs make of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import float_program, load_model, meta_model, random_ids
from torch import Tensor

from fxquant import FxquantError
from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.passes import AssignSchemes, Calibrate, PairSmoothing
from fxquant.policy.policy import load_policy
from fxquant.program.program import Program
from fxquant.runtime.execute import execute, prefill_inputs

M4 = "deepseek_w4a8_msmodelslim_m4"
TARGETS = ("ascend", "mindie", "onnx")
Smoothed = tuple[Program, Checkpoint]


def policy_of(folder: Path, text: str, parent: str = "deepseek_w4a8") -> str:
    (folder / "policy.yaml").write_text(f"extends: {parent}\n{text}")
    return str(folder / "policy.yaml")


def smoothed(checkpoint: Checkpoint, policy: str, rows: int = 4) -> Smoothed:
    """The float graph with its pairs, and the checkpoint as calibration on random tokens smoothed it."""
    loaded, program = load_policy(policy), float_program(checkpoint)
    AssignSchemes(loaded)(program)
    PairSmoothing(loaded)(program)
    batches = [random_ids(meta_model(checkpoint), 1, 24, seed) for seed in range(rows)]
    calibrate = Calibrate(loaded, checkpoint, lambda: batches)
    calibrate(program)
    assert calibrate.used is not None
    return program, checkpoint.transformed(calibrate.used.transforms)


def logits(program: Program, checkpoint: Checkpoint) -> Tensor:
    ids = random_ids(meta_model(checkpoint), 2, 20, 9)
    return execute(program, checkpoint.read, [prefill_inputs(program, ids)])[0][0]


# what is found


def test_pairs_are_found_in_the_graph(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    program, _ = smoothed(tiny(), policy_of(tmp_path, "smooth: [{method: smoothquant}]"))
    pairs = {(pair.kind.value, pair.maker, pair.consumers) for pair in program.pairs}
    layer = "model.layers.1"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    assert len(pairs) == 11
    assert {pair for pair in pairs if layer in pair[1]} == {
        ("norm", f"{layer}.input_layernorm.weight",
         (f"{attention}.q_a_proj.weight", f"{attention}.kv_a_proj_with_mqa.weight")),
        ("norm", f"{attention}.q_a_layernorm.weight", (f"{attention}.q_b_proj.weight",)),
        ("linear", f"{attention}.kv_b_proj.weight", (f"{attention}.o_proj.weight",)),
        ("norm", f"{layer}.post_attention_layernorm.weight",
         (f"{mlp}.gate.weight", f"{mlp}.experts.gate_proj.weight", f"{mlp}.experts.up_proj.weight",
          f"{mlp}.shared_experts.gate_proj.weight", f"{mlp}.shared_experts.up_proj.weight")),
        ("swiglu", f"{mlp}.experts.up_proj.weight", (f"{mlp}.experts.down_proj.weight",)),
        ("swiglu", f"{mlp}.shared_experts.up_proj.weight", (f"{mlp}.shared_experts.down_proj.weight",)),
    }  # fmt: skip


def test_what_is_no_pair_says_why(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    loaded, program = load_policy(policy_of(tmp_path, "smooth: [{kind: attention, method: m4}]")), float_program(tiny())
    AssignSchemes(loaded)(program)
    skipped = PairSmoothing(loaded)(program).skipped
    assert skipped["layers_0_self_attn_kv_a_layernorm"] == "not only linears read it"
    assert skipped["norm"] == "all its consumers stay in float"
    assert skipped["layers_0_post_attention_layernorm"] == "no rule smooths it"


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("smooth: [{kind: embedding, method: smoothquant}]", "matches no pair"),
        ("smooth: [{method: m4}]", "has no bias to compensate it"),
        ("smooth: [{method: flex, alpha: 0.5}]", "alpha does not apply to method flex"),
        ("smooth: [{method: awq}]", "smooth.0.method"),
    ],
)
def test_wrong_rules_are_refused(tiny: Callable[..., Checkpoint], tmp_path: Path, text: str, fact: str) -> None:
    with pytest.raises(FxquantError, match=fact):
        smoothed(tiny(), policy_of(tmp_path, text))


# the formulas


def test_m4_by_its_formulas(tiny: Callable[..., Checkpoint]) -> None:
    """Spec of the method, on layer 0's first pair: what the norm gave before is seen by a hook on the eager model."""
    checkpoint = tiny()
    _, after = smoothed(checkpoint, M4)
    seen: list[Tensor] = []
    model = load_model(checkpoint)
    path = "model.layers.0.input_layernorm"
    model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output.flatten(0, -2)))
    with torch.no_grad():
        for seed in range(4):
            ids = random_ids(model, 1, 24, seed)
            model(ids, torch.ones_like(ids), torch.arange(24).expand(1, 24), model.empty_cache(1))
    x, attention = torch.cat(seen), "model.layers.0.self_attn"
    weights = {name: checkpoint.read(f"{attention}.{name}.weight") for name in ("q_a_proj", "kv_a_proj_with_mqa")}
    largest = torch.cat(list(weights.values())).abs().max(0).values.float()
    scale = (x.abs().max(0).values.sqrt() / largest.sqrt()).clamp(min=1e-5).bfloat16().float()
    shift = (x.max(0).values + x.min(0).values) / 2
    assert torch.equal(after.read(f"{path}.weight"), (checkpoint.read(f"{path}.weight").float() / scale).bfloat16())
    bias = after.read(f"{path}.bias")
    assert bias.dtype is torch.float32 and torch.equal(bias, -shift / scale)
    for name, weight in weights.items():
        assert torch.equal(after.read(f"{attention}.{name}.weight"), (weight.float() * scale).bfloat16())
        stored_bias = after.read(f"{attention}.{name}.bias")
        assert torch.equal(stored_bias, (weight.double() @ shift.double()).bfloat16())


def test_m4_leaves_zeros_beside_norms_that_it_does_not_shift(tiny: Callable[..., Checkpoint]) -> None:
    _, after = smoothed(tiny(), M4)
    for name in ("model.norm", "model.layers.1.post_attention_layernorm", "model.layers.0.self_attn.kv_a_layernorm"):
        assert torch.equal(after.read(f"{name}.bias"), torch.zeros(after.tensors[f"{name}.weight"].shape))


def test_values_are_scaled_by_head(tiny: Callable[..., Checkpoint]) -> None:
    """kv_b: of the rows of each head the key's stay, the value's are divided; o_proj is multiplied by the same."""
    before = tiny()
    _, after = smoothed(before, M4)
    kv_b, o = (f"model.layers.0.self_attn.{name}.weight" for name in ("kv_b_proj", "o_proj"))
    rows, columns = before.read(kv_b).unflatten(0, (4, 32)), before.read(o)
    scale = after.transforms.scales[kv_b]
    assert torch.equal(after.read(o), (columns.float() * scale).bfloat16())
    keys, values = after.read(kv_b).unflatten(0, (4, 32)).split(16, 1)
    assert torch.equal(keys, rows[:, :16])
    assert torch.equal(values, (rows[:, 16:].float() / scale.view(4, 16, 1)).bfloat16())


# the function


RULES = {
    "smoothquant": "smooth: [{method: smoothquant, alpha: 0.6}]",
    "flex": "smooth: [{method: flex}]",
    "m4": "smooth: [{kind: attention, method: m4}, {method: smoothquant}]\nnorm_bias: every",
}


@pytest.mark.parametrize("text", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_function_stays(tiny: Callable[..., Checkpoint], tmp_path: Path, text: str, dtype: torch.dtype) -> None:
    """Scales round once on each side of a pair: two relative errors of eps / 2 a factor, which add up like a random
    walk over the two sides of the eleven pairs. In float32 the sums over k are sqrt(k) steps more.
    Of all tokens the median: one that is near a tie of two experts may go to the other."""
    checkpoint = tiny(dtype=dtype)
    program, after = smoothed(checkpoint, policy_of(tmp_path, text))
    before = logits(float_program(checkpoint), checkpoint)
    error, steps = (logits(program, after) - before).pow(2).mean(-1).sqrt().median(), 4.0
    if dtype is torch.float32:
        steps *= checkpoint.config["hidden_size"] ** 0.5
    assert 0 < error < steps * torch.finfo(dtype).eps * before.std()


def test_without_rules_nothing_changes(tiny: Callable[..., Checkpoint]) -> None:
    _, after = smoothed(tiny(), "deepseek_w4a8_msmodelslim")
    assert not after.transforms


def test_outliers_go_where_they_do_no_harm(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A channel of each norm times 50 and its readers divided: the same function. Smoothed, the largest channel is
    near the others again."""
    tensors = load_file(tiny_folder() / "model.safetensors")
    for layer in (0, 1):
        name = f"model.layers.{layer}.input_layernorm.weight"
        tensors[name][3] *= 50
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_folder() / "config.json").read_text())
    checkpoint = open_checkpoint(tmp_path)
    _, after = smoothed(checkpoint, policy_of(tmp_path, RULES["smoothquant"]))
    norm = after.read("model.layers.0.input_layernorm.weight").float().abs()
    assert norm[3] < 12 * norm.median() < checkpoint.read("model.layers.0.input_layernorm.weight")[3]


# up_proj to down_proj


def mlp(x: Tensor, read: Callable[[str], Tensor], path: str) -> Tensor:
    """In float64."""
    gate, up, down = (read(f"{path}.{name}.weight").double() for name in ("gate_proj", "up_proj", "down_proj"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_up_and_down_of_every_expert_keep_its_function(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """Each expert has scales of its own. up and down round once each to bfloat16: a relative error of eps / 2 a
    weight, independent of one another, so that of a sum of their products is less than eps of its size."""
    before = tiny()
    policy = "smooth: [{pair: swiglu, method: smoothquant}]\n"
    _, after = smoothed(before, policy_of(tmp_path, policy), rows=8)
    x = torch.randn(16, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scales = {key.removesuffix(".up_proj.weight"): scale for key, scale in after.transforms.scales.items()}
    assert {"model.layers.0.mlp", "model.layers.1.mlp.shared_experts"} < set(scales) and len(scales) > 6
    assert len({tuple(scale.tolist()) for scale in scales.values()}) == len(scales)
    for path, scale in scales.items():
        up, down = (f"{path}.{name}.weight" for name in ("up_proj", "down_proj"))
        assert torch.equal(after.read(up), (before.read(up).float() / scale.unsqueeze(1)).bfloat16())
        assert torch.equal(after.read(down), (before.read(down).float() * scale).bfloat16())
        assert torch.equal(after.read(f"{path}.gate_proj.weight"), before.read(f"{path}.gate_proj.weight"))
        expected = mlp(x, before.read, path)
        error = (mlp(x, after.read, path) - expected).pow(2).mean().sqrt()
        assert 0 < error < torch.finfo(torch.bfloat16).eps * expected.pow(2).mean().sqrt()


def test_in_exact_arithmetic_the_function_is_the_same(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """Without the roundings of the weights, what remains are those of float64."""
    before = tiny()
    _, after = smoothed(before, policy_of(tmp_path, "smooth: [{pair: swiglu, method: flex}]"), rows=8)
    x = torch.randn(16, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def exact(name: str) -> Tensor:
        weight, columns = before.read(name).double(), after.transforms.column_scale(name)
        rows = after.transforms.row_scale(name, len(weight))
        weight = weight if columns is None else weight * columns.double()
        return weight if rows is None else weight / rows.double().unsqueeze(1)

    for path in [key.removesuffix(".up_proj.weight") for key in after.transforms.scales]:
        expected = mlp(x, before.read, path)
        assert (mlp(x, exact, path) - expected).abs().max() < 1e-13 * expected.abs().max()  # sums of 256 products


def test_an_expert_that_few_tokens_chose_stays(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """24 tokens go to two of eight experts each: some see fewer than eight."""
    _, after = smoothed(
        tiny(), policy_of(tmp_path, "smooth: [{kind: routed_expert, pair: swiglu, method: flex}]"), rows=1
    )
    experts = [key for key in after.transforms.scales if ".mlp.experts." in key]
    assert 0 < len(experts) < 8 and len(experts) == len(after.transforms.columns)
