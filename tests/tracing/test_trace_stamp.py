"""Layers that are the same are traced once: the program is that of the whole trace."""

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from own_layers import ExtraNorm, ScaledResidual
from slowness import others_slow
from stamps import Build, Indexed, Traces, checkpoint_of, decoder, of, same
from test_trace_subclasses import (
    Counted,
    Nested,
    Shared,
    Sized,
    TorchModel,
)
from torch import Tensor

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.models import DecoderLayer, DeepseekV3
from fxquant.models.deepseek_v3 import Decoder
from fxquant.policy.kinds import Kind
from fxquant.program.program import Program
from fxquant.tracing import trace


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    return Traces(monkeypatch)


# one layer of each sort


@pytest.mark.parametrize(
    ("changes", "depth"),
    others_slow(
        [
            ({}, 2),
            ({"first_k_dense_replace": 0}, 2),
            ({"first_k_dense_replace": 3}, 3),
            ({"first_k_dense_replace": 6}, 2),
            ({"q_lora_rank": None}, 2),
            ({"attention_bias": True}, 2),
            ({"n_shared_experts": 0}, 2),
        ],
        [({}, 2), ({"first_k_dense_replace": 6}, 2)],
    ),
    ids=str,
)
def test_one_layer_of_each_sort_is_traced(changes: dict[str, Any], depth: int, traces: Traces) -> None:
    stamped, whole = traces.both(DeepseekV3, checkpoint_of(**changes))
    assert traces.depths == [depth]
    assert same(stamped, whole)


def test_the_published_model_is_three_layers_and_their_copies(traces: Traces) -> None:
    config = DeepseekV3Config()
    with torch.device("meta"):
        program = trace(DeepseekV3(config), Checkpoint(Path("published"), config.model_dump(), {}))
    assert traces.depths == [3]
    assert len(program.nodes(ops.mla_attention)) == 61 and len(program.nodes(ops.moe_experts)) == 58
    assert (
        sum(map(len, (parameter.names for parameter in program.parameters.values()))) == 3 + 61 * 9 + 3 * 3 + 58 * 773
    )
    blocks = dict.fromkeys(node.meta["block"] for node in program.graph.graph.nodes if node.op == "call_function")
    assert list(blocks) == ["before", *(f"model.layers.{index}" for index in range(61)), "after"]


class Alternating(Indexed):
    """The last layer is of another sort than the last one that is traced."""

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * (1 + self.index % 2), *rest)


class ScaledInOne(Indexed):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * 0.5 if self.index == 4 else x, *rest)


class SizedFromTwo(Indexed):
    """The numbers that layers 3 and up compute with are made in layer 2."""

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        if self.index > 1:
            batch, length, _ = x.shape
            x = x * (batch * length) + x.new_zeros(batch, length + rest[3].shape[1], 1).sum(1, keepdim=True)
        return super().forward(x, *rest)


class OtherKinds(Indexed):
    """What a module is called does not show in its calls."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        if index == 4:
            self.mlp.shared_experts.kind = Kind.OTHER


class Reversed(DecoderLayer):
    """Its residual is the second operand."""

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        attended, present = self.self_attn(self.input_layernorm(x), *rest)
        x = attended + x
        return self.mlp(self.post_attention_layernorm(x)) + x, present


def fourth_of_another_class(config: DeepseekV3Config) -> DeepseekV3:
    model = DeepseekV3(config)
    model.model.layers[3] = ExtraNorm(config, 3)
    return model


def fourth_patched(config: DeepseekV3Config) -> DeepseekV3:
    model = DeepseekV3(config)
    norm = model.model.layers[3].input_layernorm
    norm.forward = MethodType(lambda self, x: type(self).forward(self, x) * 2, norm)
    return model


class FirstInAll(Decoder):
    """Every layer reads what was made before all layers."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        first = self.embed_tokens(input_ids)
        for layer in self.layers:
            layer.first = first
        return super().forward(input_ids, attention_mask, position_ids, past)


class AddsFirst(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x + self.first, *rest)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "depth"),
    [
        (of(Alternating), 3),
        (of(ScaledInOne), 3),
        (of(SizedFromTwo), 3),
        (of(OtherKinds), 2),
        (of(Reversed), 2),
        (of(Sized), 2),
        (of(Counted), 2),
        (of(ExtraNorm), 2),
        (of(Nested), 2),
        (of(Shared), 2),
        (of(ScaledResidual), 2),
        (TorchModel, 2),
        (fourth_of_another_class, 3),
        (fourth_patched, 3),
        (decoder(FirstInAll, AddsFirst), 2),
    ],
)
def test_variants_of_layers_are_traced_once_each(build: Build, depth: int, traces: Traces) -> None:
    stamped, whole = traces.both(build)
    assert traces.depths == [depth]
    assert isinstance(stamped, Program) and same(stamped, whole)
