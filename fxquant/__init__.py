"""fxquant compiles quantized DeepSeek-V3/R1 models: torch.fx graph in, Ascend and ONNX out."""

from typing import TYPE_CHECKING, Any

from fxquant.version import __version__

if TYPE_CHECKING:
    from fxquant.api import (
        CompileOptions,
        CompileReport,
        ConvertReport,
        GenerateOptions,
        OnnxOptions,
        bench,
        compare,
        compile,
        convert,
        evaluate,
        run,
        verify,
    )
    from fxquant.errors import FxquantError
    from fxquant.planning.plan import Plan, plan
    from fxquant.policy.policy import load_policy, shipped_policies

_HOMES = {
    "CompileOptions": "fxquant.api",
    "CompileReport": "fxquant.api",
    "ConvertReport": "fxquant.api",
    "GenerateOptions": "fxquant.api",
    "OnnxOptions": "fxquant.api",
    "Plan": "fxquant.planning.plan",
    "bench": "fxquant.api",
    "compare": "fxquant.api",
    "compile": "fxquant.api",
    "convert": "fxquant.api",
    "evaluate": "fxquant.api",
    "plan": "fxquant.planning.plan",
    "run": "fxquant.api",
    "verify": "fxquant.api",
    "FxquantError": "fxquant.errors",
    "load_policy": "fxquant.policy.policy",
    "shipped_policies": "fxquant.policy.policy",
}

__all__ = [
    "CompileOptions",
    "CompileReport",
    "ConvertReport",
    "FxquantError",
    "GenerateOptions",
    "OnnxOptions",
    "Plan",
    "__version__",
    "bench",
    "compare",
    "compile",
    "convert",
    "evaluate",
    "load_policy",
    "plan",
    "run",
    "shipped_policies",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `fxquant --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fxquant' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
