"""Multi-token prediction (MTP) layer of a checkpoint (DeepSeek-V3, arXiv:2412.19437, section 2.2).

No graph runs it: engines do, as a draft model. It defines which tensors there are and the kind of each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fxquant.checkpoint.config import DeepseekV3Config
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
    """A decoder layer over `eh_proj` of the next token's embedding and the last hidden state, both normed."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)


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
