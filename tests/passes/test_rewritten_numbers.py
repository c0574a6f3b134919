"""What the rewritten graph computes."""

from collections.abc import Callable

import pytest
import torch
from rewrites import ULP, Rewritten, check_registered, every_policy, integers_of, rewrite
from tiny import float_program, meta_model, random_ids
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.schemes.schemes import Recipe

# the numbers


def per_token(x: Tensor) -> Tensor:
    """int64 `rne(x * (127 / max|x|))`, in float32."""
    return torch.round(x * (127 / x.abs().amax(-1, keepdim=True))).long()


def check_linear(done: Rewritten, recipe: Recipe) -> None:
    """Integers with ==, the float result against float64."""
    values, checkpoint, module = done.values, done.checkpoint, recipe.module
    dequantize = done.node(module.removeprefix("model.").replace(".", "_"))
    matmul = dequantize.args[0]
    x8, weight = values[matmul.args[0].name], integers_of(recipe, module, checkpoint)
    assert torch.equal(values[matmul.name].double(), x8.double() @ weight[0].double().T), module
    quantize = matmul.args[0] if recipe.scheme.static else matmul.args[0].args[0]
    x = values[quantize.args[0].name]
    if recipe.scheme.static:
        scale, offset = static_parameters(recipe)
        expected = torch.round(x / scale.float() + offset.float()).clamp(-128, 127)
        whole, step = x8.double() - offset.double(), scale.double()
    else:
        expected = per_token(x)
        whole, step = x8.double(), (x.abs().amax(-1, keepdim=True) / 127).double()
    assert torch.equal(x8.long(), expected.long()), module
    product = (whole @ weight[0].double().T) * step * weight[1]
    bias = checkpoint.read(f"{module}.bias").double() if recipe.bias else torch.zeros(len(weight[1])).double()
    # every integer is exact, its float32 conversion too (below 2**24); deq_scale, the product and the sum with a bias
    # are rounded, and a folded bias is first rounded to a whole number of steps
    bound = 3 * ULP * (product.abs() + bias.abs())
    if recipe.bias and recipe.scheme.static:
        bound += 0.5 * step * weight[1] * (1 + 4 * ULP) + 2 * ULP * bias.abs()
    assert ((values[dequantize.name] - (product + bias)).abs() <= bound).all(), module


def static_parameters(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """input_scale and input_offset of a range in bfloat16 arithmetic."""
    low, high = min(recipe.activation.low, 0), max(recipe.activation.high, 0)
    assert recipe.activation.arithmetic is torch.bfloat16
    scale = (torch.tensor(high).bfloat16() - torch.tensor(low).bfloat16()) / 255
    return scale, torch.round(-torch.tensor(low).bfloat16() / scale) - 128


@every_policy
def test_every_rewritten_linear_computes_its_fake_quantization(policy: str, under: Callable[[str], Rewritten]) -> None:
    done = under(policy)
    recipes = [recipe for recipe in done.program.recipes.values() if recipe.modules == (recipe.module,)]
    assert len(recipes) == (0 if policy == "float" else 14)
    for recipe in recipes:
        check_linear(done, recipe)


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w4a8_dynamic"])
def test_linears_with_a_bias_compute_theirs(policy: str, tiny: Callable[..., Checkpoint]) -> None:
    done = rewrite(tiny(attention_bias=True), policy)
    biased = [recipe for recipe in done.program.recipes.values() if recipe.bias]
    assert len(biased) == 6
    for recipe in biased:
        check_linear(done, recipe)
    check_registered(done.program)  # a bias that was folded into quant_bias is gone
    assert (f"{biased[0].module}.bias" in done.program.parameters) is (policy == "deepseek_w4a8_dynamic")


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w4a8_per_channel", "deepseek_w8a8"])
def test_routed_experts_compute_their_fake_quantization(policy: str, under: Callable[[str], Rewritten]) -> None:
    done, prefix = under(policy), "layers_1_mlp_experts_"
    values = {name.removeprefix(prefix): value for name, value in done.values.items()}
    x, weights = values["layers_1_post_attention_layernorm"].flatten(0, 1), values["layers_1_mlp_gate_1"].flatten(0, 1)
    ids, row_index = values["layers_1_mlp_gate_0"].flatten(0, 1), values["row_index"].view(-1, 2)
    recipes = {name: done.program.recipes[f"model.layers.1.mlp.experts.{name}_proj"] for name in ("gate", "up", "down")}
    table = {
        (name, expert): integers_of(recipe, recipe.modules[expert], done.checkpoint)
        for name, recipe in recipes.items()
        for expert in range(8)
    }
    assert len(set(ids.flatten().tolist())) > 4
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for slot in range(2):
            row, expert = row_index[token, slot], int(ids[token, slot])
            hidden = {}
            x8 = per_token(x[token])
            assert torch.equal(values["rows_int8"][row].long(), x8)
            for name in ("gate", "up"):
                codes, scale = table[name, expert]
                assert torch.equal(values[f"{name}_proj_int32"][row].long(), codes @ x8)
                hidden[name] = (codes @ x8).double() * scale * (x[token].abs().max() / 127).double()
                # two float32 products
                close(values[f"{name}_proj"][row], hidden[name], 3 * ULP)
            gate, up = (values[f"{name}_proj"][row].double() for name in ("gate", "up"))
            swiglu = values["swiglu"][row]
            # exp, sum, quotient and product in float32, exp to two units
            close(swiglu, gate / (1 + (-gate).exp()) * up, 8 * ULP)
            h8, (codes, scale) = per_token(swiglu), table["down", expert]
            assert torch.equal(values["swiglu_int8"][row].long(), h8)
            assert torch.equal(values["down_proj_int32"][row].long(), codes @ h8)
            down = (codes @ h8).double() * scale * (swiglu.abs().max() / 127).double()
            close(values["down_proj"][row], down, 3 * ULP)
            result[token] += weights[token, slot].double() * values["down_proj"][row].double()
    terms = (weights.double().unsqueeze(-1) * values["down_proj"][row_index].double()).abs().sum(1)
    # two products and their sum in float32
    assert ((done.values["layers_1_mlp_experts"].flatten(0, 1) - result).abs() <= 3 * ULP * terms).all()


def close(value: Tensor, exact: Tensor, relative: float) -> None:
    assert ((value.double() - exact).abs() <= relative * exact.abs()).all()


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w8a8"])
def test_the_rewritten_model_is_near_the_float_model(
    policy: str, under: Callable[[str], Rewritten], checkpoint: Checkpoint
) -> None:
    """Only that nothing is badly wired: the logits still correlate."""
    program = float_program(checkpoint)
    batch = prefill_inputs(program, random_ids(meta_model(checkpoint), 2, 9))
    exact = execute(program, checkpoint.read, [batch])[0][0].flatten()
    logits = under(policy).values["lm_head"].flatten()
    # measured 0.98 and above; unrelated logits of this size correlate below 0.1
    assert torch.corrcoef(torch.stack((exact, logits)))[0, 1] > 0.9
