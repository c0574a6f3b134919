"""How to serve the common Ascend format with vllm-ascend releases from 2025-08-20 to 2026-08-07."""

from fxquant.engines.serving import Serving


def serve(serving: Serving) -> str:
    """A command."""
    return f"vllm serve {serving.quoted} --quantization ascend --tensor-parallel-size 8 --enable-expert-parallel"
