"""Function bodies in ONNX, one per fxq operator; parameters have the names of the operator's schema.

Values have their dtype and the dimensions that the graph fixes; a body states its formula if it differs from the
reference in `fxquant.ops`. Each file lists its bodies in `BODIES`.
"""

from inspect import cleandoc
from typing import Any

from fxquant.lowering.onnx.builder import Body
from fxquant.lowering.onnx.functions import attention, dense, heads_attention, latent_attention, moe, qdq, quantized
from fxquant.ops import REFERENCES

BODIES: dict[Any, Body] = {
    **dense.BODIES,
    **attention.BODIES,
    **latent_attention.BODIES,
    **heads_attention.BODIES,
    **moe.BODIES,
    **quantized.BODIES,
    **qdq.BODIES,
}
MEANINGS = {body: cleandoc(REFERENCES[operator].__doc__ or "").split("\n\n")[0] for operator, body in BODIES.items()}
"""Body → what its operator computes, in the words of the reference."""
VIEWS = quantized.VIEWS | qdq.VIEWS
