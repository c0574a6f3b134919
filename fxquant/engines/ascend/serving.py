"""How to serve the common Ascend format with the vllm-ascend releases that load it."""

from fxquant.engines.serving import Serving


def serve(serving: Serving) -> str:
    """A command. Experts are whole with one flag: there are then as many expert-parallel ranks as ranks."""
    layout = serving.layout
    words = ["vllm serve", serving.quoted]
    words += ["--quantization ascend"] if serving.quantized else []
    words += [f"--tensor-parallel-size {layout.tp}"]
    words += [f"--data-parallel-size {layout.replicas}"] if layout.replicas > 1 else []
    words += ["--enable-expert-parallel"] if layout.ep > 1 else []
    return " ".join(words)
