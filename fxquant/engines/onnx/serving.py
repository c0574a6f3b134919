"""How to run the graph of an output with ONNX Runtime."""

from fxquant.engines.serving import Serving


def serve(serving: Serving) -> str:
    """Python. The option changes nothing but on x86 without VNNI, where int16 sums of products would saturate."""
    graph = f"{serving.folder}/model.onnx" if serving.folder else "model.onnx"
    precise = "options = ort.SessionOptions(); options.add_session_config_entry('session.x64quantprecision', '1')"
    return f"import onnxruntime as ort; {precise}; session = ort.InferenceSession({graph!r}, options)"
