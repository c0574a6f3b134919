"""ONNX Runtime: an ONNX graph over weight files in the common Ascend form."""

from dataclasses import replace

from fxquant.lowering.engines import ascend

ENGINE = replace(ascend.ENGINE, reader=lambda group_size: None, npu_graph=False)
