"""A module on the meta device → a float program, in the order of the work.

inputs.py      what it is run on
calls.py       runs it and writes down every call
layers.py      which layers make the same calls, so that one of each is exported
export.py      torch.export of that model; where it fails, undeclared.py says what to declare
canonical.py   one spelling for one meaning
stamp.py       the graph of all layers from that of one of each
annotate.py    module, kind and block of each node
parameters.py  the tensors behind it
"""

from fxquant.tracing.export import trace

__all__ = ["trace"]
