"""Subclassed models: what their forward does is what the graph does, or it is refused with the reason."""

from collections.abc import Callable

import pytest
import torch
from graphs import DENSE_LAYER, computes_the_same, equal, flat, run, text, traced
from own_layers import ExtraNorm, ScaledResidual
from tiny import float32_bound, inputs, load_model, load_weights, meta_model, random_ids
from torch import Tensor, nn

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.models import DecoderLayer, DeepseekV3, RMSNorm
from fxquant.policy.kinds import Kind
from fxquant.program.program import Program
from fxquant.tracing import trace


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Checkpoint]) -> Checkpoint:
    return tiny()


@pytest.fixture(scope="module")
def program(checkpoint: Checkpoint) -> Program:
    return trace(meta_model(checkpoint), checkpoint)


def test_an_extra_norm_is_in_the_graph(checkpoint: Checkpoint) -> None:
    program = traced(checkpoint, ExtraNorm)
    expected = DENSE_LAYER.replace("embed_tokens", "extra_norm")
    assert text(program, "model.layers.0") == (
        "\nextra_norm = rms_norm(embed_tokens, extra_norm_weight, 1e-05)" + expected
    )
    parameter = program.parameters["model.layers.1.extra_norm.weight"]
    assert (parameter.names, parameter.kind) == (("model.layers.1.extra_norm.weight",), Kind.NORM)


def test_a_residual_factor_is_in_the_graph(checkpoint: Checkpoint) -> None:
    added = "sub = sub(add_1, embed_tokens)\nmul = mul(sub, 0.5)\nadd_2 = add(embed_tokens, mul)\n"
    assert text(traced(checkpoint, ScaledResidual), "model.layers.0") == DENSE_LAYER + added
    assert computes_the_same(checkpoint, ScaledResidual)


class TorchLayer(DecoderLayer):
    """torch's own modules in place of ours."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn.o_proj = nn.Linear(64, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.dropout(x).clone(), *rest)


class TorchModel(DeepseekV3):
    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config, layer=TorchLayer)
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)


def test_torch_modules_become_the_dialect(checkpoint: Checkpoint, program: Program) -> None:
    with torch.device("meta"):
        model = TorchModel(meta_model(checkpoint).config)
    translated = trace(model, checkpoint)
    assert text(translated, "model.layers.0") == DENSE_LAYER
    assert text(translated, "before") == text(program, "before")
    assert translated.parameters.keys() == program.parameters.keys()
    ours = load_model(checkpoint)
    arguments = inputs(ours, random_ids(ours, 2, 5))
    assert equal(run(translated, checkpoint, arguments), flat(ours(*arguments)))
    # torch's own norm rounds at other places than ours
    expected = ours(*arguments)[0]
    difference = load_weights(model, checkpoint)(*arguments)[0] - expected
    assert difference.abs().max() <= float32_bound(ours, expected)


class Adapter(DecoderLayer):
    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        self.adapter = nn.Linear(config.hidden_size, config.hidden_size)
        self.adapter_norm = nn.RMSNorm(config.hidden_size, eps=1e-3)

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.adapter_norm(self.adapter(x)), *rest)


def test_torch_modules_keep_their_bias_and_eps(checkpoint: Checkpoint) -> None:
    assert text(traced(checkpoint, Adapter), "model.layers.0").startswith(
        "\nadapter = linear(embed_tokens, adapter_weight, adapter_bias)"
        "\nadapter_norm = rms_norm(adapter, adapter_norm_weight, 0.001)\ninput_layernorm = "
    )


class Sized(DecoderLayer):
    """Reshapes by its input's sizes, a symbol each."""

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        folded = x.reshape(batch, length, 2, width // 2).flip(2).reshape(batch, length, width)
        return super().forward(folded + x.new_zeros(batch, length, 1), *rest)


class Counted(DecoderLayer):
    """Makes a tensor of its own, on the device of its input."""

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * torch.arange(x.shape[-1], device=x.device) / 100, *rest)


class InPlace(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        y, present = super().forward(x, *rest)
        y += x
        return y.mul_(0.5), present


class InPlaceOnAView(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        y, present = super().forward(x, *rest)
        y[..., :4].mul_(0.5)
        return y, present


class InPlaceOnAClone(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        y, present = super().forward(x, *rest)
        copy = y.clone()
        copy.mul_(0.5)
        return y + copy, present


@pytest.mark.parametrize("layer", [Sized, Counted, InPlace, InPlaceOnAView, InPlaceOnAClone])
def test_graph_computes_what_a_subclass_computes(checkpoint: Checkpoint, layer: type[DecoderLayer]) -> None:
    assert computes_the_same(checkpoint, layer)


class Nested(DecoderLayer):
    """A list of modules inside a layer."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        self.norms = nn.ModuleList(RMSNorm(config.hidden_size) for _ in range(3))

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        for norm in self.norms:
            x = norm(x)
        return super().forward(x, *rest)


def test_a_list_inside_a_layer_is_part_of_its_block(checkpoint: Checkpoint) -> None:
    calls = [node for node in traced(checkpoint, Nested).graph.graph.nodes if node.op == "call_function"]
    inside = [node for node in calls if ".layers.1" in node.meta["module"]]
    assert {node.meta["block"] for node in inside} == {"model.layers.1"}
    assert sum(".norms." in node.meta["module"] for node in inside) == 3


class Shared(DecoderLayer):
    """Both norms of a layer are one module."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        self.post_attention_layernorm = self.input_layernorm


def test_a_shared_module_is_one_parameter(checkpoint: Checkpoint) -> None:
    program = traced(checkpoint, Shared)
    assert "model.layers.0.post_attention_layernorm.weight" not in program.parameters
    norms = [node for node in program.graph.graph.nodes if node.name.startswith("layers_0_input_layernorm_weight")]
    assert [len(node.users) for node in norms] == [2]


# refusing


class DataDependent(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * 2 if x.sum() > 0 else x, *rest)


class ByLength(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * 2 if x.shape[1] > 3 else x, *rest)


class ByPrefill(DecoderLayer):
    """Another path when the cache is empty, as attention code often has."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * 2 if past.shape[1] == 0 else x, cos, sin, mask, past)


class ByDecode(DecoderLayer):
    """Another path for a single token."""

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * 2 if x.shape[1] == 1 else x, *rest)


class Raises(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("by design")


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (DataDependent, "cannot be traced: .*"),
        (ByLength, "model.layers.0.*: ByLength takes a different path .*"),
        (ByPrefill, "model.layers.0.*: ByPrefill takes a different path .*"),
        (ByDecode, "model.layers.0.*: ByDecode takes a different path .*"),
    ],
)
def test_control_flow_is_refused(checkpoint: Checkpoint, layer: type[DecoderLayer], what: str) -> None:
    with pytest.raises(FxquantError, match=f"{what}control flow free of tensor values"):
        traced(checkpoint, layer)


def test_an_error_in_the_forward_is_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(FxquantError, match="cannot be traced: ValueError: by design"):
        traced(checkpoint, Raises)


class WritesItsCache(DecoderLayer):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        past.mul_(0.5)
        return super().forward(x, cos, sin, mask, past)


def test_writing_into_an_input_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(FxquantError, match="cannot be traced: .*writes into"):
        traced(checkpoint, WritesItsCache)


class ConstantInForward(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * torch.tensor(2.0), *rest)


class ConstantInInit(DecoderLayer):
    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        self.factor = torch.ones(config.hidden_size)

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * self.factor, *rest)


class VectorInForward(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * torch.tensor([2.0]), *rest)


@pytest.mark.parametrize("layer", [ConstantInForward, VectorInForward, ConstantInInit])
def test_constant_tensors_are_refused(checkpoint: Checkpoint, layer: type[DecoderLayer]) -> None:
    with pytest.raises(FxquantError, match=r"layers\.0\..*: is a constant tensor made in .* Make it a parameter"):
        traced(checkpoint, layer)
