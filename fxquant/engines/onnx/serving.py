"""How to run the graph of an output with ONNX Runtime."""

from fxquant.engines.serving import Serving


def serve(serving: Serving) -> str:
    """Python."""
    return f"onnxruntime.InferenceSession({f'{serving.folder}/model.onnx'!r})"
