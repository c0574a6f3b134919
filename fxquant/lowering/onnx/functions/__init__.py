"""Function bodies in ONNX, one per fxq operator; parameters have the names of the operator's schema.

Values have their dtype and the dimensions that the graph fixes; a body states its formula if it differs from the
reference in `fxquant.ops`. Each file lists its bodies in `BODIES`.
"""

from typing import Any

from fxquant.lowering.onnx.builder import Body
from fxquant.lowering.onnx.functions import attention, dense, latent_attention, moe, qdq, quantized

BODIES: dict[Any, Body] = {
    **dense.BODIES,
    **attention.BODIES,
    **latent_attention.BODIES,
    **moe.BODIES,
    **quantized.BODIES,
    **qdq.BODIES,
}
VIEWS = quantized.VIEWS | qdq.VIEWS
