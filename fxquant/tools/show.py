"""fxquant show"""

from pathlib import Path
from typing import Annotated

import typer

from fxquant.tools.compile_options import CheckpointFolder, TraceTimeout
from fxquant.tools.console import console, errors, print_line, print_notes, print_whole


def command(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A compiled folder, a checkpoint folder (weights not needed), a config.json, or a model.py.",
            show_default=False,
        ),
    ],
    block: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCK", help="Show one block: a layer such as model.layers.3, or before, between_0, …, after."
        ),
    ] = None,
    checkpoint: CheckpointFolder = None,
    hash_only: Annotated[
        bool,
        typer.Option("--hash", help="Print only the structural hash; graphs that compute the same have the same hash."),
    ] = False,
    fused: Annotated[
        bool, typer.Option("--fused", help="Show the fused graph that the NPU runs, and what was fused.")
    ] = False,
    trace_timeout: TraceTimeout = 120.0,
) -> None:
    """Print the graph of a model, or the rewritten graph of a compiled folder, with shapes and parameter names.

    No weights are needed.
    """
    from fxquant.api import open_graph
    from fxquant.checkpoint.config_notes import config_notes
    from fxquant.program.structural_hash import structural_hash
    from fxquant.program.text import check_block, format_program

    program = open_graph(model, checkpoint, trace_timeout)
    if block is not None:
        check_block(program, block)
    table = None
    if fused:
        from fxquant.lowering.ascend.deployment import deployment
        from fxquant.tools.fusion_table import fusion_table

        deployed = deployment(program)
        program, table = deployed.program, fusion_table(deployed)
    if hash_only:
        console.print(structural_hash(program))
        print_notes(config_notes(program.config), errors)
        return
    for line in format_program(program, block):
        print_whole(line)
    if block is None:
        calls = sum(node.op == "call_function" for node in program.graph.graph.nodes)
        summary = f"{calls:,} calls, {len(program.parameters):,} parameters, structural hash {structural_hash(program)}"
        print_line((summary, "dim"))
    if table is not None:
        console.print(table)
    print_notes(config_notes(program.config))
