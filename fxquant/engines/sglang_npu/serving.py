"""How to serve an output with SGLang on NPU."""

from fxquant.engines.serving import Serving


def serve(serving: Serving) -> str:
    """A command."""
    device = "--device npu --attention-backend ascend"
    command = f"python -m sglang.launch_server --model-path {serving.quoted} --quantization modelslim"
    return f"{command} {device} --tp-size 8"
