"""ONNX passes, over the graph that `model.onnx` is emitted from."""
