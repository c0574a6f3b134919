"""Adapters with which a model file declares its own classes, in LEAVES; see docs/model-file.md."""

from fxquant.frontend.adapters import MLP, Adapter, Attention, Embedding, Linear, MoE, RMSNorm

__all__ = ["MLP", "Adapter", "Attention", "Embedding", "Linear", "MoE", "RMSNorm"]
