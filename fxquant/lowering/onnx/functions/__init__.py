"""One ONNX function body for each operator of the dialect; parameters are named as in the operator's schema.

Values arrive with their dtype and the dimensions that the graph fixes; a body states its formula where it differs
from the reference in `fxquant.ops`. Each file lists its own in `BODIES`.
"""

from typing import Any

from fxquant.lowering.onnx.builder import Body
from fxquant.lowering.onnx.functions import attention, dense, moe, quantized

BODIES: dict[Any, Body] = {**dense.BODIES, **attention.BODIES, **moe.BODIES, **quantized.BODIES}
VIEWS = quantized.VIEWS
