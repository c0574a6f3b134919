"""Multi-token prediction (MTP) layers of a checkpoint (DeepSeek-V3, arXiv:2412.19437, section 2.2).

Engines run them as a draft model, calibration to observe their inputs; they are in no graph that is written. They
define which tensors there are and the kind of each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxquant import ops
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.models import rotary
from fxquant.models.deepseek_v3 import DecoderLayer, Head
from fxquant.models.layers import Embedding, Gate, Linear, RMSNorm, RoutedExperts
from fxquant.policy.kinds import Kind
from fxquant.schemes.roles import tensor_name


class SharedHead(nn.Module):
    """Norm and head after the layer; the head is the model's own, stored again."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Head(config.hidden_size, config.vocab_size)


class MtpLayer(DecoderLayer):
    """A decoder layer over `eh_proj` of a later token's embedding and the last hidden state, both normed."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, later_ids: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden [B, S, hidden], later_ids int64 [B, S] → hidden state [B, S, hidden] before the shared head's norm,
        and the latents as of a decoder layer."""
        joined = torch.cat((self.enorm(self.embed_tokens(later_ids)), self.hnorm(hidden)), -1)
        return super().forward(self.eh_proj(joined), cos, sin, attention_mask, past)


class Predictors(nn.Module):
    """All prediction layers, one after the other, without their heads.

    The first takes the hidden states that the model's head reads, which are normed, and each other one those of the
    layer before it, as vLLM and SGLang run them; MindIE and the reference quantizer take the model's before the norm.
    Decoder layers are empty, so that paths are those of the checkpoint.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        first, count = config.num_hidden_layers, config.num_nextn_predict_layers
        layers = [nn.Identity() for _ in range(first)] + [MtpLayer(config, first + step) for step in range(count)]
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(layers)
        self.inv_freq, self.attention_factor = rotary.frequencies(config), rotary.attention_factor(config)

    def forward(
        self, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor], later_ids: list[Tensor], hidden: Tensor
    ) -> Tensor:
        """Mask and positions as of the model; of each layer a latent [B, T - S, latent] and the ids int64 [B, S] of the
        tokens one, two, … places after each position; hidden [B, S, hidden] → the last layer's hidden state."""
        cos, sin = ops.rope_table(position_ids, self.inv_freq, self.attention_factor)
        layers = self.model.get_submodule("layers").children()
        predictors = [layer for layer in layers if isinstance(layer, MtpLayer)]
        for layer, ids, cache in zip(predictors, later_ids, past, strict=True):
            hidden, _ = layer(hidden, ids, cos, sin, attention_mask, cache)
        return hidden


@dataclass(frozen=True)
class MtpLinear:
    """A quantizable weight of such a layer.

    module   its path: `model.layers.61.self_attn.o_proj`, or `model.layers.61.mlp.experts.up_proj` for all experts
    modules  paths in the checkpoint, one per expert, or just `module`
    """

    module: str
    kind: Kind
    modules: tuple[str, ...]
    out_features: int
    in_features: int
    bias: bool = False


def mtp_linears(config: DeepseekV3Config, path: str) -> Iterator[MtpLinear]:
    """Every quantizable weight of the layer at `path`, in the order of its modules."""
    layer = _on_meta(config, path)
    for name, module in layer.named_modules():
        place, kind = f"{path}.{name}", _kind(layer, name)
        if isinstance(module, Linear):
            n, k = module.weight.shape
            yield MtpLinear(place, kind, (place,), n, k, module.bias is not None)
        elif isinstance(module, RoutedExperts):
            for projection, stack in module.named_parameters():
                modules = module.checkpoint_modules(place, projection)
                yield MtpLinear(f"{place}.{projection}", kind, modules, stack.shape[1], stack.shape[2])


def mtp_tensors(config: DeepseekV3Config, path: str) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Tensor names of the layer at `path` in a checkpoint, those of a stack together, and the shape of each tensor."""
    for name, module in _on_meta(config, path).named_modules():
        place = f"{path}.{name}"
        for parameter, tensor in module.named_parameters(recurse=False):
            if isinstance(module, RoutedExperts):
                yield module.checkpoint_names(place, parameter), tuple(tensor.shape[1:])
            else:
                yield (tensor_name(place, parameter),), tuple(tensor.shape)


def mtp_gate_biases(config: DeepseekV3Config, path: str) -> Iterator[str]:
    """Tensors of the layer at `path` that are float32 in every checkpoint form."""
    for name, module in _on_meta(config, path).named_modules():
        if isinstance(module, Gate):
            yield tensor_name(f"{path}.{name}", "e_score_correction_bias")


def _on_meta(config: DeepseekV3Config, path: str) -> MtpLayer:
    with torch.device("meta"):
        return MtpLayer(config, int(path.rpartition(".")[2]))


def _kind(layer: nn.Module, name: str) -> Kind:
    """The kind of the nearest module that has one; MTP for modules of the layer itself."""
    while name:
        kind = getattr(layer.get_submodule(name), "kind", None)
        if kind is not None:
            return kind
        name = name.rpartition(".")[0]
    return Kind.MTP
