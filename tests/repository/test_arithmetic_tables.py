"""Schemes, operators and algorithms: each has an entry in every table that is asked for it."""

import pytest
import torch

from fxquant import ops
from fxquant.errors import InternalError
from fxquant.kernels.search import ROW_KERNELS
from fxquant.lowering.ascend.emitter.statements import EMITTERS, PRODUCTS
from fxquant.lowering.ascend.operators import KERNELS, LINEARS, SCHEMAS, SHAPES
from fxquant.lowering.onnx.functions import BODIES, VIEWS
from fxquant.ops.joined import GROUPED_LINEARS
from fxquant.ops.quantized import GROUPED, LINEAR_FORMS
from fxquant.passes.write_form import expert_form, form_of
from fxquant.schemes.schemes import Recipe, Scheme, WeightAlgorithm
from fxquant.verification.engine_check import READ_CODES
from fxquant.verification.reference_search import SEARCHES

QUANTIZED = [scheme for scheme in Scheme if scheme.weight_bits is not None]


def recipe(scheme: Scheme) -> Recipe:
    return Recipe("m", ("m",), scheme, 0, 8, 64, False, False, torch.bfloat16)


def test_every_scheme_with_integer_weights_has_a_form_and_no_form_is_of_none() -> None:
    assert {(scheme.weight_bits, scheme.activation) for scheme in QUANTIZED} == LINEAR_FORMS.keys()
    with pytest.raises(InternalError, match="linears have no form of FLOAT"):
        form_of(recipe(Scheme.FLOAT))


def test_routed_experts_have_forms_of_what_needs_no_calibration() -> None:
    assert expert_form(recipe(Scheme.W8A8_DYNAMIC)) and expert_form(recipe(Scheme.W4A8_DYNAMIC))
    for scheme in QUANTIZED:
        form = expert_form(recipe(scheme))
        assert form is None or not scheme.static
        assert form is None or all(step.operator in GROUPED.values() for step in form)


def test_steps_take_what_is_there() -> None:
    """Every operand is the input, an earlier result, or a tensor; the last step gives one result."""
    for form in LINEAR_FORMS.values():
        for step in form:
            results = len(step.operator._schema.returns)
            assert len(step.gives) == results and len(step.names) == (1 if results == 1 else 1 + results)
        assert len(form[-1].gives) == 1


def test_both_lowerings_know_every_operator_of_a_form() -> None:
    for form in LINEAR_FORMS.values():
        targets = [step.operator for step in form]
        assert all(target in BODIES for target in targets)
        for before, after in zip(targets, targets[1:], strict=False):
            assert before in EMITTERS or (after, before) in LINEARS
        assert targets[-1] in {call for call, _ in LINEARS} | EMITTERS.keys()
    assert PRODUCTS | {ops.linear} >= READ_CODES
    assert {operator for operator, _ in VIEWS} <= BODIES.keys() | {*GROUPED.values(), *GROUPED_LINEARS.values()}
    assert KERNELS.keys() == SHAPES.keys() <= SCHEMAS.keys()


def test_every_algorithm_that_chooses_scales_has_kernels_and_a_reference() -> None:
    choosing = {algorithm.scales for algorithm in WeightAlgorithm}
    assert choosing == ROW_KERNELS.keys() == SEARCHES.keys() | {WeightAlgorithm.MIN_MAX}
    for kernels in ROW_KERNELS.values():
        assert kernels.by_bits.keys() == {scheme.weight_bits for scheme in QUANTIZED}
