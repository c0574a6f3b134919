"""Kernels on rows as they lie on disk, bit for bit against whole-tensor torch: every dtype, scheme, form and block."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_loops import FLOATS, recipe_of, same_tensors
from kernel_reference import decoded, reference_tensors
from test_kernels import KINDS, row_of
from torch import Tensor

from fxquant.errors import FxquantError
from fxquant.kernels.module_tensors import ModuleMaker, make_tensors, rounded_weight
from fxquant.kernels.source_rows import SourceRows, rows_of
from fxquant.schemes.schemes import ActivationRange, Recipe, Scheme, tensor_specs
from fxquant.schemes.weight_formats import WeightFormat
from fxquant.verification.reference import expected_tensors

K, GROUP = 192, 32
STORED = (*FLOATS, torch.float8_e4m3fn)
BLOCKS = ((128, 128), (3, 40), (1, 192), (2, 7), (64, 256))
FORMS = [
    (Scheme.W8A8, 0, WeightFormat.PACKED, False),
    (Scheme.W8A8, 0, WeightFormat.PER_CHANNEL, False),
    (Scheme.W8A8_MIX, 0, WeightFormat.PACKED, False),
    (Scheme.W8A8_DYNAMIC, 0, WeightFormat.PACKED, False),
    (Scheme.W8A8_DYNAMIC, 0, WeightFormat.PER_CHANNEL, False),
    *(
        (Scheme.W4A8_DYNAMIC, 0, weight_format, parallel)
        for weight_format in WeightFormat
        for parallel in (False, True)
    ),
    *(
        (Scheme.W4A8_DYNAMIC, GROUP, weight_format, parallel)
        for weight_format in (WeightFormat.PACKED, WeightFormat.UNPACKED)
        for parallel in (0, 1)
    ),
    (Scheme.W4A8_DYNAMIC, 96, WeightFormat.PACKED, True),
]


def weight_of(stored: torch.dtype, generator: torch.Generator, kinds: tuple[str, ...] = KINDS) -> Tensor:
    """[n, 192] in which rows of every kind stand; float8 rows have random codes too, none of them NaN."""
    weight = torch.stack([row_of(kind, stored, K, generator) for kind in kinds]).to(stored)
    if stored is torch.float8_e4m3fn:
        codes = torch.randint(0, 256, (len(kinds), K), generator=generator).to(torch.uint8)
        codes[codes & 0x7F == 0x7F] = 1
        weight = torch.cat((weight.view(torch.uint8), codes)).view(stored)
    return weight


def scales_of(weight: Tensor, block: tuple[int, int], generator: torch.Generator, exponents: range) -> np.ndarray:
    shape = [-(-edge // size) for edge, size in zip(weight.shape, block, strict=True)]
    powers = torch.randint(exponents.start, exponents.stop, shape, generator=generator)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 10.0**powers).float().numpy()


ORDINARY, TINY, HUGE = range(-6, 3), range(-45, -36), range(30, 36)


def source_of(weight: Tensor, model: torch.dtype, start: int = 0, count: int = 0, **changes: object) -> SourceRows:
    """Rows start … start + count of a weight, as bytes."""
    rows = weight.view(torch.uint8).numpy().reshape(len(weight), -1)[start : start + (count or len(weight))]
    return SourceRows(rows, weight.dtype, weight.shape[1], start, model, **changes)


def recipe_for(source: SourceRows, form: tuple, biased: bool = False) -> Recipe:
    scheme, group_size, weight_format, row_parallel = form
    recipe = recipe_of(torch.empty(source.rows, source.in_features, device="meta"), scheme, group_size)
    dtype = source.model_dtype
    scale_dtype = dtype if weight_format.model_dtype_scales else torch.float32
    observed = ActivationRange(-3.0, 2.0) if scheme.static else None
    changes = {
        "weight_format": weight_format,
        "row_parallel": bool(row_parallel),
        "scale_dtype": scale_dtype,
        "bias": biased,
    }
    return replace(recipe, dtype=dtype, activation=observed, **changes)


def made_of(recipe: Recipe, source: SourceRows, bias: Tensor | None = None) -> dict[str, Tensor]:
    maker = ModuleMaker(recipe, "w", bias)
    tensors = maker.rows(source) | maker.rest()
    return {suffix: tensors[suffix] for suffix in tensor_specs(recipe)}


def check(recipe: Recipe, source: SourceRows, bias: Tensor | None = None) -> bool:
    """Equal to the reference in every bit, or refused where a value is not finite. Whether it was made."""
    weight = decoded(source)
    bad = (~torch.isfinite(weight.float())).any(1).nonzero().flatten().tolist()
    if bad:
        with pytest.raises(FxquantError, match=rf"NaN or infinity \(row {source.start + bad[0]}\)"):
            made_of(recipe, source, bias)
        return False
    tensors = made_of(recipe, source, bias)
    assert same_tensors(tensors, reference_tensors(recipe, weight, bias))
    specs = {suffix: (spec.dtype, spec.shape) for suffix, spec in tensor_specs(recipe).items()}
    assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()} == specs
    return True


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
def test_every_form_from_every_dtype(stored: torch.dtype, form: tuple) -> None:
    """Rows of every kind; float8 with block scales of every size, and with blocks that the edges cut."""
    generator = torch.Generator().manual_seed(0)
    count = 0
    for model in (stored,) if stored is not torch.float8_e4m3fn else FLOATS:
        weight = weight_of(stored, generator)
        smooth = (torch.rand(K, generator=generator) * 0.9 + 0.01).numpy()
        divided = (torch.rand(len(weight), generator=generator) * 0.9 + 0.6).numpy()
        scalings = (
            [{"scale_inv": scales_of(weight, block, generator, size), "block": block} for block in BLOCKS for size in
             (ORDINARY, TINY, HUGE)]
            if stored is torch.float8_e4m3fn
            else [{}]
        )  # fmt: skip
        for scaling in scalings:
            for changes in ({}, {"smooth": smooth}, {"smooth": smooth, "divided": divided}):
                source = source_of(weight, model, **changes, **scaling)
                count += check(recipe_for(source, form), source)
    assert count >= 2


def test_the_reference_of_verification_agrees() -> None:
    generator = torch.Generator().manual_seed(1)
    for stored in FLOATS:
        weight = weight_of(stored, generator, KINDS[:3] + KINDS[4:5])
        for form in FORMS:
            if not form[0].static:
                source = source_of(weight, stored)
                recipe = recipe_for(source, form)
                assert same_tensors(made_of(recipe, source), expected_tensors(recipe, weight, None))


@st.composite
def sources(draw: Callable) -> SourceRows:
    """Any even number of rows from anywhere in a weight of 16, and what decoding needs."""
    stored = draw(st.sampled_from(STORED))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = weight_of(stored, generator, tuple(draw(st.lists(st.sampled_from(KINDS), min_size=16, max_size=16))))
    start = draw(st.integers(0, 14))
    count = 2 * draw(st.integers(1, (16 - start) // 2))
    smooth = (torch.rand(K, generator=generator) * 10.0 ** draw(st.integers(-6, 6))).numpy()
    divided = ((torch.rand(16, generator=generator) + 0.1) * 10.0 ** draw(st.integers(-6, 6))).numpy()
    changes = {"smooth": draw(st.sampled_from([None, smooth])), "divided": draw(st.sampled_from([None, divided]))}
    if stored is torch.float8_e4m3fn:
        block = draw(st.sampled_from(BLOCKS))
        size = draw(st.sampled_from([ORDINARY, ORDINARY, TINY, HUGE]))
        changes |= {"scale_inv": scales_of(weight, block, generator, size), "block": block}
    return source_of(weight, draw(st.sampled_from(FLOATS)), start, count, **changes)


@settings(deadline=None, max_examples=300)
@given(sources(), st.sampled_from(FORMS), st.booleans())
def test_any_rows_are_those_of_the_reference(source: SourceRows, form: tuple, biased: bool) -> None:
    bias = torch.zeros(source.rows).to(source.model_dtype) if biased else None
    recipe = recipe_for(source, form, biased)
    check(recipe, source, bias)


def collected(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
def test_blocks_of_rows_make_the_whole(form: tuple) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = weight_of(torch.float8_e4m3fn, generator, ("random", "spike") * 20)
    scaling = {"scale_inv": scales_of(weight, (24, 40), generator, ORDINARY), "block": (24, 40)}
    scaling["smooth"] = (torch.rand(K, generator=generator) + 0.5).numpy()
    source = source_of(weight, torch.bfloat16, **scaling)
    bias = torch.randn(len(weight), generator=generator).bfloat16()
    recipe = recipe_for(source, form, biased=True)
    whole = made_of(recipe, source, bias)
    assert same_tensors(whole, reference_tensors(recipe, decoded(source), bias))
    for sizes in ((2,) * 40, (32, 32, 16), (2, 50, 28), (10, 70)):
        maker, parts = ModuleMaker(recipe, "w", bias), []
        for index, size in enumerate(sizes):
            block = source_of(weight, torch.bfloat16, sum(sizes[:index]), size, **scaling)
            parts.append({suffix: tensor.clone() for suffix, tensor in maker.rows(block).items()})
        assert same_tensors(collected(parts) | maker.rest(), whole)


def test_rows_of_a_call_lie_where_those_of_the_last_one_lay() -> None:
    """What the documentation of `rows` says; `make_tensors` gives memory of its own."""
    weight = weight_of(torch.bfloat16, torch.Generator().manual_seed(3))
    source = source_of(weight, torch.bfloat16)
    recipe = recipe_for(source, FORMS[-1])
    maker = ModuleMaker(recipe, "w")
    first = maker.rows(source)
    assert {suffix: tensor.data_ptr() for suffix, tensor in first.items()} == {
        suffix: tensor.data_ptr() for suffix, tensor in maker.rows(source).items()
    }
    calls = [make_tensors(recipe, "w", weight)["weight"].data_ptr(), make_tensors(recipe, "w", weight)["weight"]]
    assert calls[0] != first["weight"].data_ptr() != calls[1].data_ptr()


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_bytes_may_lie_anywhere_and_be_read_only(stored: torch.dtype) -> None:
    """Mapped files begin a tensor at any byte."""
    generator = torch.Generator().manual_seed(4)
    weight = weight_of(stored, generator, ("random",) * 4)
    scaling = {}
    if stored is torch.float8_e4m3fn:
        scaling = {"scale_inv": scales_of(weight, (2, 128), generator, ORDINARY), "block": (2, 128)}
    source = source_of(weight, torch.bfloat16, **scaling)
    data = b"x" + source.raw.tobytes()
    shifted = replace(source, raw=np.frombuffer(data, np.uint8, offset=1))
    assert shifted.raw.ctypes.data % 2 and not shifted.raw.flags.writeable and shifted.rows == source.rows
    for form in FORMS:
        recipe = recipe_for(source, form)
        assert same_tensors(made_of(recipe, shifted), made_of(recipe, source))


def test_a_tensor_is_read_where_it_lies() -> None:
    weight = torch.ones(2, 32, dtype=torch.bfloat16)
    assert rows_of(weight).raw.ctypes.data == weight.data_ptr()
    transposed = torch.randn(32, 4, generator=torch.Generator().manual_seed(5)).T
    assert same_tensors(
        make_tensors(recipe_of(transposed, Scheme.W8A8_DYNAMIC), "w", transposed),
        make_tensors(recipe_of(transposed, Scheme.W8A8_DYNAMIC), "w", transposed.contiguous()),
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scheme", [Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC])
def test_rows_that_are_not_finite_round_to_nan(scheme: Scheme, value: float) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(6))
    rounded = rounded_weight(recipe_of(weight, scheme), weight)
    weight[1, 5] = weight[4, 0] = value
    rounded[1] = rounded[4] = torch.nan
    assert torch.equal(rounded_weight(recipe_of(weight, scheme), weight).nan_to_num(9e9), rounded.nan_to_num(9e9))


def test_rows_that_do_not_fit_are_an_error() -> None:
    weight = torch.ones(3, 32)
    with pytest.raises(ValueError, match="3 rows of 32"):
        ModuleMaker(recipe_of(weight, Scheme.W4A8_DYNAMIC), "w").rows(rows_of(weight))
    with pytest.raises(ValueError, match="rows of 32"):
        ModuleMaker(recipe_of(torch.ones(3, 16), Scheme.W8A8_DYNAMIC), "w").rows(rows_of(weight))
    with pytest.raises(ValueError, match="block scales"):
        SourceRows(np.zeros((2, 32), np.uint8), torch.float8_e4m3fn, 32).encoded()
    scales, raw = np.ones((1, 1), np.float32), np.zeros((2, 32), np.uint8)
    source = SourceRows(raw, torch.float8_e4m3fn, 32, scale_inv=scales)
    assert source.encoded().scales.shape == (1, 1)
    for changes in ({"start": 127}, {"block": (128, 16)}, {"smooth": np.ones(31, np.float32)}):
        with pytest.raises(ValueError, match="scales"):
            replace(source, **changes).encoded()
    with pytest.raises(ValueError, match="in room for"):
        rounded_weight(recipe_of(torch.ones(3, 16), Scheme.W8A8_DYNAMIC), weight)
    for changes in ({"group_size": 24}, {"row_parallel": True}):
        recipe = replace(recipe_of(torch.ones(2, 40), Scheme.W4A8_DYNAMIC), **changes)
        with pytest.raises(ValueError, match="do not divide"):
            make_tensors(recipe, "w", torch.ones(2, 40))
