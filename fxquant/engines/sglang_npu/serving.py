"""How to serve an output with SGLang on NPU."""

from fxquant.engines.serving import Serving


def serve(serving: Serving) -> str:
    """A command. `--tp-size` counts all ranks there; attention is split over those of one data-parallel copy.

    A draft model is taken for quantized as the model is, and then SGLang refuses its float experts; without speculation
    the option does nothing (srt/arg_groups/serving_hook.py, srt/layers/quantization/modelslim/modelslim.py).
    """
    layout = serving.layout
    words = ["python -m sglang.launch_server --model-path", serving.quoted]
    words += ["--quantization modelslim"] if serving.quantized else []
    words += [f"--device npu --attention-backend ascend --tp-size {layout.ranks}"]
    words += [f"--dp-size {layout.replicas} --enable-dp-attention"] if layout.replicas > 1 else []
    words += [f"--ep-size {layout.ep}"] if layout.ep > 1 else []
    words += ["--speculative-draft-model-quantization unquant"] if serving.quantized and serving.float_draft else []
    return " ".join(words)
