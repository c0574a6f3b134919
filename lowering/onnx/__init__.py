"""The ONNX target: standard operators and local functions over the same weight files, read by onnxruntime."""

from fxquant.lowering.onnx.writer import write_onnx

__all__ = ["write_onnx"]
