"""Layers that depend on more than the one before are traced whole, or refused as they would be alone."""

import re
from types import MethodType

import pytest
import torch
from stamps import LAYERS, Build, Indexed, NoCacheInLast, Traces, decoder, of, same
from test_trace_subclasses import (
    ByDecode,
    ConstantInForward,
    ConstantInInit,
    InPlace,
    InPlaceOnAView,
)
from torch import Tensor

from fxquant import ops
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.models import DecoderLayer, DeepseekV3
from fxquant.models.deepseek_v3 import Decoder
from fxquant.program.program import Program

pytestmark = pytest.mark.slow


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    return Traces(monkeypatch)


# what is traced whole


class ScaledByIndex(Indexed):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * (1 + self.index), *rest)


def shared_module(config: DeepseekV3Config) -> DeepseekV3:
    """All attentions are one."""
    model = DeepseekV3(config)
    for layer in model.model.layers:
        layer.self_attn = model.model.layers[0].self_attn
    return model


def shared_parameter(config: DeepseekV3Config) -> DeepseekV3:
    model = DeepseekV3(config)
    for layer in model.model.layers:
        layer.input_layernorm.weight = model.model.layers[1].input_layernorm.weight
    return model


def foreign_parameter(config: DeepseekV3Config) -> DeepseekV3:
    """Each norm multiplies by the weight of layer 0's, too."""
    model = DeepseekV3(config)
    first = model.model.layers[0].input_layernorm
    for layer in model.model.layers:
        norm = layer.input_layernorm
        norm.forward = MethodType(lambda self, x: type(self).forward(self, x) * first.weight, norm)
    return model


class Decoding(Decoder):
    """As its base; what a forward does with layers is given by `run`."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        cos, sin = ops.rope_table(position_ids, self.inv_freq, self.attention_factor)
        x, presents = self.run(self.embed_tokens(input_ids), past, (cos, sin, attention_mask))
        return self.norm(x), presents

    def run(self, x: Tensor, past: list[Tensor], rest: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        presents = []
        for layer, cache in zip(self.layers, past, strict=True):
            x, present = layer(x, *rest, cache)
            presents.append(present)
        return x, presents


class LastTwice(Decoding):
    def run(self, x: Tensor, past: list[Tensor], rest: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        x, presents = super().run(x, past, rest)
        return self.layers[-1](x, *rest, past[-1])[0], presents


class SkipsOne(Decoding):
    def run(self, x: Tensor, past: list[Tensor], rest: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        presents = []
        for index, (layer, cache) in enumerate(zip(self.layers, past, strict=True)):
            y, present = layer(x, *rest, cache) if index != 2 else (x, cache + 0)
            x = y
            presents.append(present)
        return x, presents


class SkipsItsResult(Decoding):
    """Layer 3 reads what layer 1 made."""

    def run(self, x: Tensor, past: list[Tensor], rest: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        values, presents = [x], []
        for index, (layer, cache) in enumerate(zip(self.layers, past, strict=True)):
            x, present = layer(values[-2 if index == 3 else -1], *rest, cache)
            values.append(x)
            presents.append(present)
        return x, presents


class Between(Decoding):
    def run(self, x: Tensor, past: list[Tensor], rest: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        presents = []
        for layer, cache in zip(self.layers, past, strict=True):
            x, present = layer(x * 2, *rest, cache)
            presents.append(present)
        return x, presents


class ByDepth(Decoding):
    def run(self, x: Tensor, past: list[Tensor], rest: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        x, presents = super().run(x, past, rest)
        return x / len(self.layers), presents


class ForItsDepth(Decoding):
    def run(self, x: Tensor, past: list[Tensor], rest: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        x, presents = super().run(x, past, rest)
        return x + presents[LAYERS - 1].mean(), presents


class ReadsFirstCache(Decoding):
    def run(self, x: Tensor, past: list[Tensor], rest: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        presents = []
        for layer in self.layers:
            x, present = layer(x, *rest, past[0])
            presents.append(present)
        return x, presents


class OtherOrder(Decoding):
    def run(self, x: Tensor, past: list[Tensor], rest: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        x, presents = super().run(x, past, rest)
        return x, [presents[1], presents[0], *presents[2:]]


class CarriesTwo(Decoding):
    """Layers hand on two tensors."""

    def run(self, x: Tensor, past: list[Tensor], rest: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        presents, residual = [], x
        for layer, cache in zip(self.layers, past, strict=True):
            x, residual, present = layer(x, residual, *rest, cache)
            presents.append(present)
        return x + residual, presents


class TwoStreams(DecoderLayer):
    def forward(self, x: Tensor, residual: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attended, present = self.self_attn(self.input_layernorm(x + residual), *rest)
        residual = residual + attended
        return self.mlp(self.post_attention_layernorm(residual)), residual, present


class AddsInPlace(DecoderLayer):
    """The tensor that comes in is the one that goes out."""

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        y, present = super().forward(x, *rest)
        x += y
        return x, present


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (of(ScaledByIndex), "no two layers are the same"),
        (of(AddsInPlace), "a layer passes on no tensor or several"),
        (shared_module, "a module of a layer that is not its own"),
        (shared_parameter, "a module of a layer that is not its own"),
        (foreign_parameter, "a module of a layer that is not its own"),
        (decoder(LastTwice), "do not run in order, once each"),
        (decoder(SkipsOne), "do not run in order, once each"),
        (decoder(SkipsItsResult), "a result of a layer before the previous one"),
        (decoder(Between), "calls between layers"),
        (decoder(ByDepth), "with fewer layers the calls differ"),
        (decoder(ForItsDepth), "a layer passes on no tensor or several"),
        (decoder(ReadsFirstCache), "the cache of another layer"),
        (decoder(CarriesTwo, TwoStreams), "a layer passes on no tensor or several"),
        (decoder(NoCacheInLast), "not one latent cache for each layer"),
    ],
)
def test_layers_that_depend_on_more_are_traced_whole(build: Build, reason: str, traces: Traces) -> None:
    stamped, whole = traces.both(build)
    assert traces.depths[-1] == LAYERS
    assert len(traces.reasons) == 1 and reason in traces.reasons[0]
    assert isinstance(stamped, Program) and same(stamped, whole)


class ScalesCosines(DecoderLayer):
    """What it writes shows in the layers after it."""

    def forward(self, x: Tensor, cos: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        cos.mul_(0.9)
        return super().forward(x, cos, *rest)


class ScalesItsInput(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        x.mul_(0.9)
        return super().forward(x, *rest)


@pytest.mark.parametrize("layer", [InPlace, InPlaceOnAView, ScalesCosines, ScalesItsInput])
def test_writes_in_place_are_in_the_graph_stamped_or_whole(layer: type[DecoderLayer], traces: Traces) -> None:
    stamped, whole = traces.both(of(layer))
    assert isinstance(stamped, Program) and same(stamped, whole)
    assert (traces.depths[-1] < LAYERS) == (layer is not ScalesCosines)


def test_outputs_may_be_in_any_order(traces: Traces) -> None:
    stamped, whole = traces.both(decoder(OtherOrder))
    assert isinstance(stamped, Program) and same(stamped, whole)


# what is refused


class ReadsLength(Indexed):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x if x.shape[1] else x, *rest)


class LongerThanAnyRun(ReadsLength):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return DecoderLayer.forward(self, x * 2 if x.shape[1] > 10**9 else x, *rest)


def test_layers_of_another_class_are_another_sort_though_they_make_the_same_calls(traces: Traces) -> None:
    stamped, whole = traces.both(lambda config: DeepseekV3(config, mixed))
    assert isinstance(stamped, str) and stamped == whole and "cannot be traced" in stamped


def mixed(config: DeepseekV3Config, index: int) -> DecoderLayer:
    """Only the fourth layer has a branch on its input's length, which no run takes."""
    return (LongerThanAnyRun if index == 3 else ReadsLength)(config, index)


class LongInOne(Indexed):
    """One layer has a branch that no run takes."""

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * 2 if self.index == 4 and x.shape[1] > 5000 else x, *rest)


class ByDecodeInOne(Indexed):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * 2 if self.index == 4 and x.shape[1] == 1 else x, *rest)


class ReadsAValueInOne(Indexed):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * rest[2].sum().item() if self.index == 4 else x, *rest)


class ConstantInOne(Indexed):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * torch.tensor(2.0) if self.index == 4 else x, *rest)


class WritesInOne(Indexed):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        if self.index == 4:
            rest[3].mul_(0.5)
        return super().forward(x, *rest)


@pytest.mark.parametrize(
    ("layer", "fact"),
    [
        (ByDecode, "a different path"),
        (ConstantInForward, "model.layers.0.*constant tensor"),
        (ConstantInInit, "model.layers.0.factor: is a constant tensor"),
        (LongInOne, "model.layers.4: LongInOne takes a different path"),
        (ByDecodeInOne, "a different path"),
        (ReadsAValueInOne, "cannot be traced"),
        (ConstantInOne, "model.layers.4.*constant tensor"),
        (WritesInOne, "writes into"),
    ],
)
def test_what_the_whole_trace_refuses_is_refused(layer: type[DecoderLayer], fact: str, traces: Traces) -> None:
    stamped, whole = traces.both(of(layer))
    assert isinstance(stamped, str) and isinstance(whole, str)
    assert stamped == whole
    assert re.search(fact, stamped)
