"""How to serve an output with vllm-ascend from 2026-08-08 on."""

from fxquant.engines.serving import Serving


def serve(serving: Serving) -> str:
    """A command."""
    return f"vllm serve {serving.quoted} --quantization ascend --tensor-parallel-size 8 --enable-expert-parallel"
