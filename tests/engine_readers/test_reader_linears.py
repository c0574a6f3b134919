"""Linears outside the routed experts, as every engine loads them."""

from pathlib import Path

import pytest
import torch
from open_readers import open_reader
from reader_folders import UNPACKED_DESCRIPTION, Draft
from torch import Tensor

from fxquant.engine_readers import Arithmetic
from fxquant.engine_readers.linear_loader import MixedLinear
from fxquant.engine_readers.ranks import Loaded, Ranks
from fxquant.errors import FxquantError

RANKS = (1, 2, 4, 8, 16)
LINEAR = "model.layers.0.self_attn.q_b_proj"
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
ROWS = pytest.mark.parametrize("row_parallel", [False, True], ids=["column", "row"])
N, K = 32, 64


def random_input(k: int = K) -> Tensor:
    return torch.randn(2, 3, k, generator=torch.Generator().manual_seed(7))


def static_ideal(draft: Draft, x8: Tensor) -> Tensor:
    """float64 of what the stored tensors say."""
    tensors = {suffix: draft.tensors[f"{LINEAR}.{suffix}"] for suffix in ("quant_bias", "deq_scale")}
    scale = tensors["deq_scale"]
    if scale.dtype is torch.int64:
        scale = scale.to(torch.int32).view(torch.float32)
    sums = x8.double() @ draft.truths[LINEAR].codes.double().T + tensors["quant_bias"].double()
    return sums * scale.double()


def assert_within(result: Tensor, ideal: Tensor, bound: Tensor) -> None:
    assert result.dtype is torch.float32
    assert ((result.double() - ideal).abs() <= bound).all()


def assert_same_on_any_ranks(results: list[Tensor]) -> None:
    """float64 sums in another order, then one rounding to float32: neighbours at most."""
    for other in results[1:]:
        assert ((other - results[0]).abs() <= 2.0**-23 * results[0].abs()).all()


@DTYPES
@ROWS
@pytest.mark.parametrize("short", [False, True], ids=["with-weight-scale", "without"])
def test_static_on_any_ranks(tmp_path: Path, dtype: torch.dtype, row_parallel: bool, short: bool) -> None:
    draft = Draft(dtype)
    draft.static(LINEAR, N, K, short=short)
    folder, x, results = draft.write(tmp_path), random_input(), []
    for ranks in RANKS:
        loaded = open_reader("vllm-ascend", folder, ranks).linear(LINEAR, row_parallel)
        x8, scale = loaded.quantize(x, Arithmetic.EXACT)
        assert torch.equal(x8, (torch.round(x / scale - 5)).clamp(-128, 127).to(torch.int8))
        assert torch.equal(loaded.codes().long(), draft.truths[LINEAR].codes)
        results.append(loaded(x, Arithmetic.EXACT))
        assert_within(results[-1], static_ideal(draft, x8), loaded.bound(x))
        assert len(loaded.partials(x, Arithmetic.EXACT)) == (ranks if row_parallel else 1)
    assert_same_on_any_ranks(results)


def test_the_quant_bias_of_a_row_parallel_linear_is_the_first_ranks(tmp_path: Path) -> None:
    draft = Draft()
    draft.static(LINEAR, N, K)
    loaded = open_reader("vllm-ascend", draft.write(tmp_path), 4).linear(LINEAR, row_parallel=True)
    assert isinstance(loaded, Ranks)
    biases = [shard.quant_bias for shard in loaded.shards]
    assert torch.equal(biases[0], draft.tensors[f"{LINEAR}.quant_bias"]) and biases[1:] == [None] * 3


@DTYPES
def test_static_kernel_rounds_reciprocal_scale_and_output(tmp_path: Path, dtype: torch.dtype) -> None:
    draft = Draft(dtype)
    draft.static(LINEAR, N, K)
    loaded, x = open_reader("vllm-ascend", draft.write(tmp_path)).linear(LINEAR), random_input()
    held = draft.tensors[f"{LINEAR}.input_scale"]
    x8 = torch.round(x.to(dtype).float() * (1 / held).float() - 5).clamp(-128, 127).to(torch.int8)
    assert torch.equal(loaded.quantize(x, Arithmetic.KERNEL)[0], x8)
    sums = x8.long() @ draft.truths[LINEAR].codes.T + draft.tensors[f"{LINEAR}.quant_bias"]
    scale = draft.tensors[f"{LINEAR}.deq_scale"]
    if dtype is torch.float16:
        scale = (scale & 0xFFFFE000).to(torch.int32).view(torch.float32)
    assert torch.equal(loaded(x, Arithmetic.KERNEL), (sums.float() * scale).to(dtype).float())


@DTYPES
@ROWS
@pytest.mark.parametrize("engine", ["vllm-ascend", "sglang-npu", "mindie", "mindie-2.1rc1"])
def test_per_token_on_any_ranks(tmp_path: Path, dtype: torch.dtype, row_parallel: bool, engine: str) -> None:
    if engine == "sglang-npu" and dtype is torch.float16:
        pytest.skip("it does not serve float16 models")
    draft = Draft(dtype)
    draft.per_token(LINEAR, N, K, biased=engine == "mindie-2.1rc1")
    draft.for_engine(engine, 256)
    folder, x, results = draft.write(tmp_path), random_input(), []
    for ranks in RANKS:
        loaded = open_reader(engine, folder, ranks).linear(LINEAR, row_parallel)
        x8, x_scale = loaded.quantize(x, Arithmetic.EXACT)
        assert torch.equal(x8, torch.round(x * (127 / x.abs().amax(-1, True))).to(torch.int8))
        assert torch.equal(loaded.codes().long(), draft.truths[LINEAR].codes)
        results.append(loaded(x, Arithmetic.EXACT))
        assert_within(results[-1], draft.truths[LINEAR].result(x8, x_scale), loaded.bound(x))
    assert_same_on_any_ranks(results)


def test_a_row_parallel_rank_takes_the_scale_of_its_own_slice_on_the_device(tmp_path: Path) -> None:
    draft = Draft()
    draft.per_token(LINEAR, N, K)
    loaded = open_reader("vllm-ascend", draft.write(tmp_path), 2).linear(LINEAR, row_parallel=True)
    x = random_input().bfloat16().float()
    x[..., : K // 2] /= 128
    codes, scale = loaded.quantize(x, Arithmetic.KERNEL)
    assert scale.shape == (2, 3, 2)
    assert torch.equal(scale, torch.stack([part.abs().amax(-1) / 127 for part in x.chunk(2, -1)], -1))
    assert int(codes[..., : K // 2].abs().amax()) == 127
    whole = loaded.quantize(x, Arithmetic.EXACT)[0]
    assert int(whole[..., : K // 2].abs().amax()) <= 3, "the whole row's scale leaves a small half few steps"


def test_outputs_that_ranks_do_not_divide_are_held_whole(tmp_path: Path) -> None:
    draft = Draft()
    draft.per_token(LINEAR, 40, K)
    loaded = open_reader("vllm-ascend", draft.write(tmp_path), 16).linear(LINEAR)
    assert loaded.codes().shape == (40, K)


def test_a_narrow_weight_scale_costs_what_the_bound_says(tmp_path: Path) -> None:
    """vllm-ascend rounds the float32 scale, and the bound knows; 16-bit scales cost nothing."""
    draft = Draft()
    draft.per_token(LINEAR, N, K)
    x = random_input()
    wide = open_reader("vllm-ascend", draft.write(tmp_path / "wide")).linear(LINEAR)
    draft.tensors[f"{LINEAR}.weight_scale"] = draft.tensors[f"{LINEAR}.weight_scale"].bfloat16().float()
    narrow = open_reader("vllm-ascend", draft.write(tmp_path / "narrow")).linear(LINEAR)
    y = wide(x, Arithmetic.EXACT).double().abs()
    assert (wide.bound(x) >= 2.0**-9 * y).all() and (wide.bound(x) <= 2.0**-7 * y + 2.0**-149).all()
    assert (narrow.bound(x) <= 2.0**-23 * narrow(x, Arithmetic.EXACT).abs() + 2.0**-149).all()


@pytest.mark.parametrize("engine", ["vllm-ascend", "mindie"])
def test_mixed_linears_are_static_in_decode_and_per_token_in_prefill(tmp_path: Path, engine: str) -> None:
    draft = Draft()
    draft.static(LINEAR, N, K, "W8A8_MIX")
    if engine == "mindie":
        draft.for_mindie(256, mla_quantize="w8a8_pdmix")
    loaded, x = open_reader(engine, draft.write(tmp_path), 2).linear(LINEAR), random_input()
    assert isinstance(loaded, MixedLinear)
    x8, x_scale = loaded.quantize(x, Arithmetic.EXACT)
    assert_within(loaded(x, Arithmetic.EXACT), draft.truths[LINEAR].result(x8, x_scale), loaded.bound(x))
    decode = loaded.decode
    x8, _ = decode.quantize(x, Arithmetic.EXACT)
    assert_within(decode(x, Arithmetic.EXACT), static_ideal(draft, x8), decode.bound(x))
    assert torch.equal(decode.codes(), loaded.codes())


def test_float_linears_stay_float(tmp_path: Path) -> None:
    draft = Draft()
    weight, x = torch.randn(N, K).bfloat16(), random_input()
    draft.put(LINEAR, "FLOAT", weight=weight)
    loaded = open_reader("vllm-ascend", draft.write(tmp_path), 2).linear(LINEAR)
    ideal = x.double() @ weight.double().T
    assert_within(loaded(x, Arithmetic.EXACT), ideal, loaded.bound(x))
    assert loaded(x, Arithmetic.KERNEL).bfloat16().float().equal(loaded(x, Arithmetic.KERNEL))
    for ask in (loaded.codes, lambda: loaded.quantize(x, Arithmetic.EXACT)):
        with pytest.raises(FxquantError, match="FLOAT"):
            ask()


def biased(tmp_path: Path, engine: str, values: Tensor) -> Loaded:
    draft = Draft()
    draft.per_token(LINEAR, N, K, biased=True)
    draft.tensors[f"{LINEAR}.bias"] = values
    return open_reader(engine, draft.for_engine(engine, 256).write(tmp_path)).linear(LINEAR)


def test_vllm_ascend_would_skip_a_bias_that_is_not_folded(tmp_path: Path) -> None:
    for engine in ("vllm-ascend", "mindie"):
        with pytest.raises(FxquantError, match=r"q_b_proj.bias.*skips"):
            biased(tmp_path / engine / "one", engine, torch.ones(N).bfloat16())
        biased(tmp_path / engine / "zero", engine, torch.zeros(N))
    with_bias = biased(tmp_path / "mindie-2.1rc1", "mindie-2.1rc1", torch.full((N,), 3.0))
    without = biased(tmp_path / "none", "mindie-2.1rc1", torch.zeros(N))
    x = random_input()
    added = with_bias(x, Arithmetic.EXACT) - without(x, Arithmetic.EXACT)
    assert torch.allclose(added, torch.tensor(3.0), atol=2.0**-20, rtol=0)  # |y| < 8: half a step of float32, twice


def test_the_bias_of_a_static_linear_is_in_quant_bias_and_not_added_again(tmp_path: Path) -> None:
    draft, x = Draft(), random_input()
    draft.static(LINEAR, N, K)
    plain = open_reader("vllm-ascend", draft.write(tmp_path / "plain")).linear(LINEAR)(x, Arithmetic.EXACT)
    draft.put(LINEAR, "W8A8", bias=torch.ones(N).bfloat16())
    again = open_reader("vllm-ascend", draft.write(tmp_path / "again")).linear(LINEAR)(x, Arithmetic.EXACT)
    assert torch.equal(plain, again)


def test_older_mindie_looks_for_its_own_description(tmp_path: Path) -> None:
    draft = Draft()
    draft.per_token(LINEAR, N, K)
    with pytest.raises(FxquantError, match=f"{UNPACKED_DESCRIPTION}.*missing"):
        open_reader("mindie-2.1rc1", draft.write(tmp_path))
