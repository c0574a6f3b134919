"""Engine's graph: whether the graph of a model is the one that the target's engine runs."""

from fxquant.compilation.options import CompileOptions
from fxquant.engines.table import ENGINES
from fxquant.frontend.published import refuse_changed
from fxquant.frontend.source import Source
from fxquant.program.program import Program


def claims_engine(options: CompileOptions) -> bool:
    """Whether the output is promised to an engine that runs model code of its own."""
    return ENGINES[options.target].model_code and not options.graph_only


def check_graph(source: Source, program: Program, options: CompileOptions) -> None:
    """Raise FxquantError if the float `program` is not what the target's engine runs."""
    if source.from_file and claims_engine(options):
        refuse_changed(program, options.target)
