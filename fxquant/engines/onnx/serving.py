"""How to run the graph of an output with ONNX Runtime."""

from fxquant.engines.serving import Serving


def serve(serving: Serving) -> str:
    """Python."""
    graph = f"{serving.folder}/model.onnx" if serving.folder else "model.onnx"
    return f"import onnxruntime; session = onnxruntime.InferenceSession({graph!r})"
