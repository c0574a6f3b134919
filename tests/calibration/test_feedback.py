"""GPTQ: codes against the slow form, constraints, what verify holds them against, experts that saw no token."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from token_files import token_ids
from torch import Tensor

from fxquant import CompileOptions, FxquantError, compile, verify
from fxquant.calibration.gptq import spread
from fxquant.calibration.gptq_codes import SolvedCodes
from fxquant.kernels.gptq import DAMPING, carry_matrix, feedback_codes, hessian
from fxquant.kernels.module_tensors import code_limits, fitted
from fxquant.schemes.schemes import Recipe, Scheme, WeightAlgorithm
from fxquant.verification import Rebuild
from fxquant.verification.reference import wrong_codes

GPTQ = """
rules:
  - {kind: attention, path: "*.kv_b_proj", scheme: FLOAT}
  - {kind: attention, path: "*.1.self_attn.o_proj", scheme: W8A8, algorithm: gptq}
  - {kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: %d, algorithm: gptq}
"""


def slow_codes(weight: Tensor, steps: Tensor, lowest: Tensor, highest: Tensor, h: Tensor) -> Tensor:
    """Each row for itself, in float64: quantize a column, then move all open columns to where the outputs on the
    inputs behind `h` change least: `w -= error * (H⁻¹ of the open columns)[j] / (H⁻¹)[j, j]`."""
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    h = h + torch.eye(len(h), dtype=torch.float64) * DAMPING * h.diagonal().mean()
    codes, left = torch.zeros_like(weight, dtype=torch.float64), weight.double().clone()
    for place, j in enumerate(order):
        still = order[place:]
        inverse = torch.linalg.inv(h[still][:, still])
        code = torch.round(left[:, j] / steps[:, j]).clamp(lowest[:, j], highest[:, j])
        codes[:, j] = code
        error = (left[:, j] - code * steps[:, j]) / inverse[0, 0]
        left[:, still] -= error.unsqueeze(1) * inverse[0]
    return codes


def inputs(tokens: int, k: int, seed: int) -> Tensor:
    """Correlated, with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, k, generator=generator) @ (torch.randn(k, k, generator=generator) / k**0.5)
    mixed[:, :2] *= 8
    return mixed


def recipe_of(scheme: Scheme, n: int, k: int, group_size: int) -> Recipe:
    gptq = WeightAlgorithm.GPTQ
    return Recipe("m", ("m",), scheme, group_size, n, k, False, False, torch.bfloat16, algorithm=gptq)


FORMS = [(Scheme.W8A8_DYNAMIC, 0), (Scheme.W4A8_DYNAMIC, 0), (Scheme.W4A8_DYNAMIC, 32)]


def solved(recipe: Recipe, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Codes, what one of each stands for, and their limits."""
    _, scale, second = fitted(recipe, weight, "m.weight")
    wide = spread(second, recipe).expand(weight.shape)
    steps, limits = scale.unsqueeze(1) * wide, code_limits(recipe, wide)
    return feedback_codes(weight.float(), steps, *limits, carry_matrix(hessian(x))), steps, limits


@settings(max_examples=10)
@given(st.integers(0, 2**20), st.sampled_from(FORMS))
def test_codes_are_those_of_the_slow_form(seed: int, form: tuple[Scheme, int]) -> None:
    """Float32 against float64: a code may differ where a weight lies within rounding of a half, and whatever of its row
    follows; three in four rows must be the same."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    x = inputs(200, 64, seed)
    codes, steps, limits = solved(recipe_of(form[0], 8, 64, form[1]), weight, x)
    expected = slow_codes(weight, steps.double(), *limits, hessian(x))
    assert (codes == expected).all(1).double().mean() >= 0.75


@pytest.mark.parametrize(("scheme", "group_size"), FORMS)
def test_outputs_are_nearer_than_those_of_nearest_codes(scheme: Scheme, group_size: int) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    x, recipe = inputs(512, 128, 2), recipe_of(scheme, 64, 128, group_size)
    codes, steps, _ = solved(recipe, weight, x)
    nearest, _, _ = fitted(recipe, weight, "m.weight")
    error, least = (((candidate * steps - weight.float()) @ x.T).square().sum() for candidate in (codes, nearest))
    assert error < 0.6 * least


@pytest.mark.parametrize(("scheme", "group_size"), FORMS)
def test_limits_hold(scheme: Scheme, group_size: int) -> None:
    """Weights far from their fit, and hardly any inputs: the codes go to their ends, and not beyond."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    codes, _, (lowest, highest) = solved(recipe_of(scheme, 16, 64, group_size), weight, inputs(3, 64, 4) * 100)
    assert ((codes >= lowest) & (codes <= highest)).all()


def test_a_row_of_zeros_and_dead_channels() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    weight[1] = 0
    x = inputs(100, 64, 6)
    x[:, 10:20] = 0
    codes, _, _ = solved(recipe_of(Scheme.W4A8_DYNAMIC, 4, 64, 32), weight, x)
    assert not codes[1].any() and codes[0].any()


def test_far_codes_are_wrong() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(7)).bfloat16()
    recipe = recipe_of(Scheme.W4A8_DYNAMIC, 4, 64, 32)
    codes, _, _ = solved(recipe, weight, inputs(100, 64, 8))
    far = codes.clone()
    far[2] = -far[2].clamp(-7, 7)
    assert "row 2" in str(wrong_codes(recipe, weight, far))
    assert "outside" in str(wrong_codes(recipe, weight, torch.full_like(codes, 8)))


# outputs


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_ids(tmp_path_factory.mktemp("text") / "ids.safetensors", seed=1)


def policy_of(folder: Path, group_size: int, more: str = "unseen_experts: all_tokens\n") -> str:
    (folder / "policy.yaml").write_text(f"extends: deepseek_w4a8\n{more}{GPTQ % group_size}")
    return str(folder / "policy.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "group_size"), [("ascend", 256), ("mindie", 256), ("vllm-ascend", 0), ("sglang-npu", 0), ("onnx", 128)]
)
def test_outputs_verify(
    tiny_folder: Callable[..., Path], ids: Path, tmp_path: Path, target: str, group_size: int
) -> None:
    out, policy = tmp_path / "out", policy_of(tmp_path, group_size)
    options = CompileOptions(policy=policy, out=out, target=target, calib=ids, export=False)  # type: ignore[arg-type]
    report = compile(tiny_folder(), options)
    assert report.verification is not None and report.verification.ok
    assert verify(out, rebuild=Rebuild()).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "policy.yaml"]


@pytest.mark.slow
def test_verify_knows_other_codes(tiny_folder: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile(
        tiny_folder(), CompileOptions(policy=policy_of(tmp_path, 256), out=out, calib=ids, export=False, verify=False)
    )
    (file,) = out.glob("quant_model_weight*.safetensors")
    tensors, name = load_file(file), "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name].roll(1, 0)
    save_file(tensors, file)
    (out / "fxquant_manifest.json").unlink()
    report = verify(out, against=tiny_folder())
    assert any(name.removesuffix(".weight") in miss for check in report.checks for miss in check.misses)


def test_the_same_bytes_again(tiny_folder: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("one", "two")]
    for out in outs:
        options = CompileOptions(policy=policy_of(tmp_path, 256), out=out, calib=ids, export=False, verify=False)
        compile(tiny_folder(), replace(options))
    files = [sorted(file.name for file in out.rglob("*") if file.is_file()) for out in outs]
    assert files[0] == files[1]
    weights = [name for name in files[0] if name.startswith("quant_model_weight") and name.endswith(".safetensors")]
    assert weights and all((outs[0] / name).read_bytes() == (outs[1] / name).read_bytes() for name in weights)


def test_an_expert_without_tokens_is_named(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """One token goes to two of eight experts."""
    text = tmp_path / "one.safetensors"
    save_file({"ids": torch.tensor([[5]])}, text)
    with pytest.raises(FxquantError, match=r"experts\.\d.*no token of the calibration text was routed to it"):
        compile(tiny_folder(), CompileOptions(policy=policy_of(tmp_path, 256, ""), out=tmp_path / "out", calib=text))
    for way in ("all_tokens", "least_squares"):
        policy = policy_of(tmp_path, 256, f"unseen_experts: {way}\n")
        compile(
            tiny_folder(), CompileOptions(policy=policy, out=tmp_path / way, calib=text, export=False, verify=False)
        )


def test_codes_need_text(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="calibration text, none given"):
        compile(tiny_folder(), CompileOptions(policy=policy_of(tmp_path, 256), out=tmp_path / "out"))


def test_without_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for only where no output folder keeps them."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(FxquantError, match="temporary folder: cannot be created: No such file.* Set TMPDIR to"):
        SolvedCodes.temporary()
