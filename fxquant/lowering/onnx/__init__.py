"""The ONNX target: standard operators and local functions over the weight files, for onnxruntime and its like.

`writer.write_onnx` emits, `runner.OnnxRunner` runs, `extract.operator_session` takes single operators out again.
"""

from fxquant.lowering.onnx.writer import write_onnx

__all__ = ["write_onnx"]
