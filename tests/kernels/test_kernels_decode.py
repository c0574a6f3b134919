"""Every code of every stored dtype, and float32 patterns rounded to shorter floats, against torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_loops import recipe_of

from fxquant.errors import FxquantError
from fxquant.kernels.decode import decode_row
from fxquant.kernels.module_tensors import ModuleMaker, make_tensors
from fxquant.kernels.rounding import BFLOAT16, FLOAT16, FLOAT32, INFINITY, round_row, row_scale
from fxquant.kernels.source_rows import SourceRows
from fxquant.schemes.schemes import Scheme

SHORT = [(torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16)]


def decode(codes: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.uint32]:
    """One row of codes: float32 bits, and the largest magnitude."""
    scale = np.ones((1, 1), np.float32) if dtype is torch.float8_e4m3fn else None
    block = (1, codes.size)
    source = SourceRows(codes.view(np.uint8), dtype, codes.size, 0, torch.float32, scale, block)
    values = np.empty(codes.size, np.float32)
    largest = decode_row(source.encoded(), 0, values)
    return values.view(np.uint32), largest


@pytest.mark.parametrize(
    ("dtype", "codes"),
    [
        (torch.bfloat16, np.arange(1 << 16, dtype=np.uint16)),
        (torch.float16, np.arange(1 << 16, dtype=np.uint16)),
        (torch.float8_e4m3fn, np.arange(1 << 8, dtype=np.uint8)),
    ],
    ids=str,
)
def test_every_code_is_decoded_as_torch_does_or_refused(dtype: torch.dtype, codes: np.ndarray) -> None:
    wide = torch.from_numpy(codes.view(np.int16 if codes.itemsize == 2 else np.int8)).view(dtype).float().numpy()
    finite = np.isfinite(wide)
    assert 0 < (~finite).sum() < len(codes) // 8
    bits, largest = decode(codes[finite], dtype)
    assert (bits == wide[finite].view(np.uint32)).all()
    assert largest == np.abs(wide[finite]).max().view(np.uint32)
    for code in codes[~finite]:
        assert decode(np.array([0, code, 0], codes.dtype), dtype)[1] >= INFINITY, hex(code)


def test_float32_rows_are_taken_as_they_are() -> None:
    values = patterns()
    values = values[np.isfinite(values)]
    bits, largest = decode(values, torch.float32)
    assert (bits == values.view(np.uint32)).all() and largest == np.abs(values).max().view(np.uint32)
    for value in (np.nan, np.inf, -np.inf):
        assert decode(np.array([1, value, 0], np.float32), torch.float32)[1] >= INFINITY


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_of_float8_is_refused_with_its_row(code: int) -> None:
    for scale, smooth in ((1.0, None), (0.0, None), (1.0, np.zeros(32, np.float32))):
        raw = np.zeros((4, 32), np.uint8)
        raw[2, 31] = code
        scales = np.full((1, 1), scale, np.float32)
        source = SourceRows(raw, torch.float8_e4m3fn, 32, 40, scale_inv=scales, smooth=smooth)
        for scheme in (Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC):
            with pytest.raises(FxquantError, match=r"NaN or infinity \(row 42\)") as caught:
                maker(scheme, 32).rows(source)
            assert caught.value.place == "w"


def maker(scheme: Scheme, k: int) -> ModuleMaker:
    return ModuleMaker(recipe_of(torch.zeros(4, k), scheme), "w")


def patterns() -> np.ndarray:
    """A million float32, among them every exponent; all halves of both short formats, and their neighbours."""
    spread = np.arange(0, 1 << 32, 4099, dtype=np.uint64).astype(np.uint32)
    codes = np.arange(1 << 16, dtype=np.uint32)
    brain = codes << 16
    half = codes.astype(np.uint16).view(np.float16).astype(np.float32)
    following = (codes + 1).astype(np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        middle = ((half.astype(np.float64) + following) / 2).astype(np.float32).view(np.uint32)
    edges = np.array([65504, 65519.996, 65520, 65536, 3.4028235e38, 2.0**-14, 2.0**-24, 2.0**-25], np.float32)
    centers = np.concatenate((brain, brain + 0x8000, half.view(np.uint32), middle, edges.view(np.uint32)))
    near = [centers + np.uint32(step) for step in (0, 1, 0xFFFFFFFF)]
    return np.concatenate((spread, *near)).view(np.float32)


@pytest.mark.parametrize(("dtype", "kernel_dtype"), SHORT, ids=str)
def test_rounding_is_that_of_torch(dtype: torch.dtype, kernel_dtype: int) -> None:
    values = patterns()
    expected = torch.from_numpy(values).to(dtype).float().numpy()
    rounded = values.copy()
    assert round_row(rounded, kernel_dtype) >= INFINITY
    number = ~np.isnan(values)
    assert (rounded[number].view(np.uint32) == expected[number].view(np.uint32)).all()
    assert np.isinf(rounded[~number]).all() and (~number).sum() > 1000
    finite = np.isfinite(expected)
    assert (~finite & number).sum() > 1000 or dtype is torch.bfloat16  # overflow, which becomes infinity
    row = values[finite]
    assert round_row(row, kernel_dtype) == np.abs(expected[finite]).max().view(np.uint32)


@settings(deadline=None, max_examples=300)
@given(st.floats(width=32), st.sampled_from(SHORT))
def test_any_float_is_rounded_as_torch_does(value: float, dtypes: tuple[torch.dtype, int]) -> None:
    row = np.array([value], np.float32)
    expected = torch.from_numpy(row).to(dtypes[0]).float().numpy()
    largest = round_row(row, dtypes[1])
    assert (largest < INFINITY) == np.isfinite(expected[0])
    assert np.isnan(value) or row.view(np.uint32) == expected.view(np.uint32)


@settings(deadline=None, max_examples=300)
@given(
    st.floats(0, float(np.finfo(np.float32).max), width=32),
    st.sampled_from([7, 119, 127]),
    st.sampled_from([*SHORT, (torch.float32, FLOAT32)]),
)
def test_a_row_scale_is_a_true_quotient_in_its_dtype(
    largest: float, maximum: int, dtypes: tuple[torch.dtype, int]
) -> None:
    value = np.array([largest], np.float32)
    expected = (torch.from_numpy(value) / maximum).to(dtypes[0]).float().item()
    assert row_scale(value.view(np.uint32)[0], maximum, dtypes[1]) == expected


def test_a_float32_weight_overflows_where_its_smoothing_does() -> None:
    weight = torch.full((2, 32), 3.0)
    source = SourceRows(
        weight.view(torch.uint8).numpy(), torch.float32, 32, 0, torch.float16, smooth=np.full(32, 3e4, np.float32)
    )
    with pytest.raises(FxquantError, match="NaN or infinity"):
        maker(Scheme.W8A8_DYNAMIC, 32).rows(source)
    assert make_tensors(recipe_of(weight, Scheme.W8A8_DYNAMIC), "w", weight)["weight"].tolist() == [[127] * 32] * 2
