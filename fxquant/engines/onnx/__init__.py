"""ONNX Runtime: an ONNX graph over weight files in the common Ascend form."""

from dataclasses import replace

from fxquant.engines import ascend
from fxquant.engines.engine import Engine

ENGINE: Engine = replace(ascend.ENGINE, open_reader=None, npu_graph=False)
