"""Python API, the verbs as functions: compile, plan, convert, verify, run, bench, evaluate, sensitivity, compare."""

from pathlib import Path

from fxquant.compilation.onnx_options import OnnxOptions
from fxquant.compilation.options import CompileOptions
from fxquant.compilation.prepare import prepare
from fxquant.evaluation.verbs import compare, engine_perplexities, evaluate, open_output, sensitivity
from fxquant.frontend.source import TRACE_TIMEOUT, open_source
from fxquant.generation.generator import TextGenerator
from fxquant.generation.options import GenerateOptions
from fxquant.lowering.output_folder.manifest import GRAPH
from fxquant.planning.plan import Plan, plan
from fxquant.program.program import Program
from fxquant.program.program_file import load_program
from fxquant.verbs.bench import Benchmark, bench
from fxquant.verbs.compile import CompileReport, compile
from fxquant.verbs.convert import ConvertReport, convert
from fxquant.verbs.run import open_generator, run
from fxquant.verbs.verify import verify


def open_graph(model: str | Path, checkpoint: Path | None = None, trace_timeout: float = TRACE_TIMEOUT) -> Program:
    """The rewritten graph of a compiled folder, or the float graph of a model, of which a config.json is enough."""
    folder = Path(model)
    if (folder / GRAPH).is_file():
        return load_program(folder / GRAPH)
    return open_source(folder, checkpoint, trace_timeout, config_only=True).program()


__all__ = [
    "Benchmark",
    "CompileOptions",
    "CompileReport",
    "ConvertReport",
    "GenerateOptions",
    "OnnxOptions",
    "Plan",
    "TextGenerator",
    "bench",
    "compare",
    "compile",
    "convert",
    "engine_perplexities",
    "evaluate",
    "open_generator",
    "open_graph",
    "open_output",
    "plan",
    "prepare",
    "run",
    "sensitivity",
    "verify",
]
