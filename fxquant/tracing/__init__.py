"""Tracing: a module on the meta device → a float program. Files in the order of the work:

inputs.py      example inputs and their dynamic sizes
calls.py       runs the module and records every call
layers.py      which layers make the same calls, so that one of each is exported
export.py      torch.export of that model; if it fails, undeclared.py says what to declare
canonical.py   torch's own calls → `fxq::` operators
stamp.py       the graph of all layers from that of one of each
annotate.py    module, kind and block of each node
parameters.py  the checkpoint tensors behind each parameter
prediction.py  the same for the multi-token prediction layers
"""

from fxquant.tracing.export import trace
from fxquant.tracing.prediction import trace_predictors

__all__ = ["trace", "trace_predictors"]
