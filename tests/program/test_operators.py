"""The table of operators that a graph may call is closed, and holds what tracing and the lowerings know."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from graphs import equal, traced
from tiny import meta_model, random_ids
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.lowering.ascend.emitter.aten import FUNCTIONAL, METHODS, TORCH
from fxquant.lowering.onnx.aten import MATH_OPERATORS, SHAPE_OPERATORS
from fxquant.models import DecoderLayer
from fxquant.program.aten_operators import ATEN
from fxquant.program.operators import NAMES, OPERATORS
from fxquant.program.program_file import dump_program, parse_program
from fxquant.runtime.execute import execute, prefill_inputs


def test_each_name_is_one_operator() -> None:
    assert len(set(ATEN)) == len(ATEN) and len(NAMES) == len(OPERATORS)
    for name, target in OPERATORS.items():
        if not name.startswith("python::"):
            assert isinstance(target, torch._ops.OpOverload), name
            assert f"{target.namespace}::{target._opname}.{target._overloadname}" == name


def test_none_writes_or_draws() -> None:
    """Into its arguments, or random numbers; `write_latents` writes pages, which no stored graph has."""
    for name in ATEN:
        target = OPERATORS[name]
        assert not target._schema.is_mutable, name
        assert torch.Tag.nondeterministic_seeded not in target.tags or "scaled_dot" in name, name


def test_what_is_lowered_is_listed() -> None:
    assert not [target for target in (*SHAPE_OPERATORS, *MATH_OPERATORS) if target not in NAMES]
    names = {name.removeprefix("aten::").split(".")[0] for name in ATEN}
    assert names >= TORCH | FUNCTIONAL | METHODS


class Drawing(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x + torch.rand_like(x), *rest)


class Strided(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x + x.as_strided((1,), (1,)), *rest)


@pytest.mark.parametrize("layer", [Drawing, Strided])
def test_an_operator_of_no_table_is_refused_when_it_is_written(
    layer: type[DecoderLayer], tiny: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(FxquantError, match=r"calls aten\.(rand_like|as_strided)\.default, which no compiled graph"):
        dump_program(traced(tiny(), layer))


class Wordy(DecoderLayer):
    """An equation, a mode, a list with gaps."""

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        x = x + torch.einsum("bsh, bth -> bsh", x, x) * 1e-6
        x = torch.div(x, 3.0, rounding_mode="trunc") * 1e-6 + x
        x = torch.nn.functional.gelu(x, approximate="tanh")[:, :, torch.arange(x.shape[2], device=x.device)]
        return super().forward(x, *rest)


def test_words_make_the_round_trip(tiny: Callable[..., Checkpoint]) -> None:
    checkpoint = tiny()
    program = traced(checkpoint, Wordy)
    loaded = parse_program(dump_program(program), "graph")
    assert dump_program(loaded) == dump_program(program)
    batch = prefill_inputs(program, random_ids(meta_model(checkpoint), 2, 5))
    results, expected = (list(execute(graph, checkpoint.read, [batch])[0]) for graph in (loaded, program))
    assert equal(results, expected)


def test_a_call_that_does_not_fit_its_inputs_is_an_error(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """A token that the embedding has no row for."""
    checkpoint = tiny()
    program = traced(checkpoint, DecoderLayer)
    batch = prefill_inputs(program, torch.tensor([[10**6]]))
    with pytest.raises(FxquantError, match=r"model\.embed_tokens: embed_tokens: "):
        execute(program, checkpoint.read, [batch])
