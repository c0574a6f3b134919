"""Scales of least squared error: kernels against the slow reference, what they promise, policies, and a compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_loops import FLOATS, recipe_of, same_tensors
from test_kernels import GROUP, KINDS, RECIPES, row_of, weights
from torch import Tensor

from fxquant.dialects import Dialect
from fxquant.kernels.recipe import make_tensors
from fxquant.reference import expected_tensors
from fxquant.schemes import Scheme, WeightAlgorithm

SEARCHES = (WeightAlgorithm.CLIP, WeightAlgorithm.LEAST_SQUARES)
FORMS = ((Scheme.W8A8_DYNAMIC, 0), (Scheme.W4A8_DYNAMIC, 0), (Scheme.W4A8_DYNAMIC, GROUP))
some = settings(deadline=None, max_examples=25)


# the reference, bit for bit


@pytest.mark.parametrize("algorithm", SEARCHES)
@pytest.mark.parametrize(("scheme", "group_size", "row_parallel"), RECIPES)
@some
@given(weights(), st.sampled_from(FLOATS))
def test_every_tensor_is_that_of_the_reference(
    algorithm: WeightAlgorithm,
    scheme: Scheme,
    group_size: int,
    row_parallel: bool,
    weight: Tensor,
    scale_dtype: torch.dtype,
) -> None:
    recipe = recipe_of(
        weight, scheme, group_size, row_parallel=row_parallel, algorithm=algorithm, scale_dtype=scale_dtype
    )
    assert same_tensors(make_tensors(recipe, "w", weight), expected_tensors(recipe, weight, None))


SHAPES = [(2, 16, 0), (4, 48, 0), (2, 100, 0), (6, 1056, 0), (4, 512, 256), (2, 1792, 128), (6, 192, 64)]


@pytest.mark.parametrize("algorithm", SEARCHES)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_other_shapes(n: int, k: int, group_size: int, algorithm: WeightAlgorithm) -> None:
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.stack([row_of(kind, torch.bfloat16, k, generator) for kind in KINDS[:n]]).bfloat16()
    for scheme in (Scheme.W4A8_DYNAMIC,) if group_size else (Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC):
        recipe = recipe_of(weight, scheme, group_size, algorithm=algorithm, dialect=Dialect.B)
        assert same_tensors(make_tensors(recipe, "w", weight), expected_tensors(recipe, weight, None))
