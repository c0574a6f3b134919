"""ONNX target: standard operators and local functions over the weight files, for onnxruntime and similar runtimes.

`writer.write_onnx` emits, `runner.OnnxRunner` runs, `extract.operator_session` extracts single operators again.
"""

from fxquant.lowering.onnx.writer import write_onnx

__all__ = ["write_onnx"]
