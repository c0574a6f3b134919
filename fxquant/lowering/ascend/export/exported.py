"""torch.export programs (.pt2) of `run_prefill` and `run_decode` of the emitted module, without weights.

To run one, a process needs torch, safetensors, and torch_npu or `fxquant.lowering.ascend.operators.register()`:

    model = Model.load(folder)                                        # of model_ascend.py
    prefill = torch.export.load(folder / "model_ascend_prefill.pt2").module()
    logits = prefill(model.weights, input_ids, step.attention_mask, step.position_ids, cache.pages, step.block_table,
                     step.slot_mapping)                               # step = cache.prefill_step(position_ids)

and decode likewise, with `step.seq_lens` as last argument. For another device: torch.export.passes.move_to_device_pass.
"""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from fxquant.gc_pause import uncollected
from fxquant.lowering.ascend.emitter.emit import ascend_code
from fxquant.lowering.ascend.export.fake_weights import fake_weights
from fxquant.program.program import Program
from fxquant.tracing.no_stack_traces import without_stack_traces

PREFILL, DECODE = "model_ascend_prefill.pt2", "model_ascend_decode.pt2"
FIRST_DAY = (1980, 1, 1, 0, 0, 0)
"""Time of every entry of the file, so that bytes do not depend on the clock: the earliest that a zip can store."""


class _Prefill(nn.Module):
    def __init__(self, model: Callable[..., Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(
        self, weights: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, pages: Any,
        block_table: Tensor, slot_mapping: Tensor,
    ) -> Tensor:  # fmt: skip
        run = self.model(weights, self.dtype).run_prefill
        return run(input_ids, attention_mask, position_ids, pages, block_table, slot_mapping, [])


class _Decode(nn.Module):
    def __init__(self, model: Callable[..., Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(
        self, weights: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, pages: Any,
        block_table: Tensor, slot_mapping: Tensor, seq_lens: list[int],
    ) -> Tensor:  # fmt: skip
        run = self.model(weights, self.dtype).run_decode
        return run(input_ids, attention_mask, position_ids, pages, block_table, slot_mapping, seq_lens)


def write_exported(
    program: Program, folder: Path, dtype: torch.dtype | None = None, sequences: int = 8, block_size: int = 128
) -> tuple[Path, Path]:
    """Export the module emitted for `program`, a deployment's; return the files of prefill and decode.

    dtype       of the floats between operators; None: the default of `Model.load`
    sequences   rows of a decoding step, some of which may have no token (position -1): npu_fused_infer_attention_score
                takes lengths as a list of integers, whose size a graph fixes. Prefill takes any number of rows.
    block_size  of the pages
    No weight is read, and the files contain none: weights are the first argument of both programs.
    """
    with uncollected():  # what export makes stays until it is written
        return _written(program, folder, dtype, sequences, block_size)


def _written(
    program: Program, folder: Path, dtype: torch.dtype | None, sequences: int, block_size: int
) -> tuple[Path, Path]:
    names = ModuleType("model_ascend").__dict__
    exec(compile(ascend_code(program), "model_ascend.py", "exec"), names)
    dtype = dtype or (torch.bfloat16 if program.dtype is torch.float32 else program.dtype)
    mode = FakeTensorMode()
    weights = fake_weights(program, names["BLOCKS"], dtype, mode)
    fixed = tree_map(lambda _: None, weights)
    with mode:
        pages = names["Model"]({}, dtype).empty_pages(11, block_size)
    files = []
    for file, graph, rows, steps in ((PREFILL, _Prefill, 3, 5), (DECODE, _Decode, sequences, 1)):
        with mode:
            arguments = _arguments(pages, rows, steps, 2 * block_size)
        shapes = _shapes(len(pages), prefill=graph is _Prefill)
        if graph is _Decode:
            arguments, shapes = (*arguments, list(range(1, rows + 1))), (*shapes, [Dim.DYNAMIC] * rows)
        with torch.no_grad(), without_stack_traces():
            exported = torch.export.export(
                graph(names["Model"], dtype), (weights, *arguments), dynamic_shapes=(fixed, *shapes), strict=False
            )
        path = folder / file
        path.write_bytes(to_bytes(exported))
        files.append(path)
    return files[0], files[1]


def _arguments(pages: list[tuple[Tensor, Tensor]], rows: int, steps: int, past: int) -> tuple[Any, ...]:
    """Tokens and a `Step` over two pages per sequence; sizes are distinct, so that export does not merge them."""
    block_size = pages[0][0].shape[1]
    ids = torch.zeros(rows, steps, dtype=torch.int64)
    mask = torch.zeros(rows, past + steps, dtype=torch.int64)
    table, slots = torch.zeros(rows, past // block_size, dtype=torch.int32), torch.zeros_like(ids, dtype=torch.int32)
    return ids, mask, torch.zeros_like(ids), pages, table, slots


def _shapes(layers: int, prefill: bool) -> tuple[Any, ...]:
    """The dynamic sizes: rows and new positions in prefill; pages, and pages per sequence, in both."""
    rows, steps = ({0: Dim("batch")}, {1: Dim("sequence")}) if prefill else ({}, {})
    pages = {0: Dim("num_blocks")}
    tokens, total, blocks = rows | steps, rows | {1: Dim("total")}, rows | {1: Dim("blocks")}
    return tokens, total, tokens, [(pages, pages)] * layers, blocks, tokens


def to_bytes(exported: ExportedProgram) -> bytes:
    """The file of a program: only operators and shapes, the same for the same graph on any machine."""
    # other metadata, such as stack traces, has paths of this machine
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    exported.example_inputs = None
    stored, rewritten = io.BytesIO(), io.BytesIO()
    torch.export.save(exported, stored)
    with zipfile.ZipFile(stored) as archive, zipfile.ZipFile(rewritten, "w", zipfile.ZIP_STORED) as target:
        for name in sorted(archive.namelist()):
            target.writestr(zipfile.ZipInfo(name, FIRST_DAY), archive.read(name))
    return rewritten.getvalue()
