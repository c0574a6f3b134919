"""Rotary frequencies that old checkpoints store beside every attention; models compute them from config.json."""

from collections.abc import Iterator

import torch

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.program.operands import operand
from fxquant.program.program import Program

SUFFIX = "rotary_emb.inv_freq"
REASON = "rotary frequencies, which config.json gives"
SMALLEST = 2.0**-24
"""The smallest step of float16, the coarsest of the stored dtypes near zero."""


def frequency_names(program: Program) -> Iterator[str]:
    """Names of stored frequencies: of each attention, those of prediction layers too, and of the decoder."""
    for node in (*program.nodes(ops.rope_table), *program.nodes(ops.mla_attention)):
        yield f"{node.meta['module']}.{SUFFIX}"
    yield from (frequency_name_of_layer(path) for path in program.mtp.layers)


def frequency_name_of_layer(path: str) -> str:
    """Name of the stored frequencies of the decoder layer at `path`."""
    return f"{path}.self_attn.{SUFFIX}"


def stored_frequencies(program: Program, checkpoint: Checkpoint) -> set[str]:
    """Stored frequencies of the checkpoint that no parameter of the graph reads.

    Raises FxquantError if they differ from the graph's by more than the rounding of their dtype: another RoPE base, or
    other YaRN numbers, make another model.
    """
    tables = [operand(node, "inv_freq") for node in program.nodes(ops.rope_table)]
    bound = program.float_names()
    names = {name for name in frequency_names(program) if name in checkpoint.tensors and name not in bound}
    for name in sorted(names) if tables else ():
        _check(name, checkpoint, torch.tensor(tables[0], dtype=torch.float64))
    return names if tables else set()


def _check(name: str, checkpoint: Checkpoint, expected: torch.Tensor) -> None:
    info = checkpoint.tensors[name]
    way_out = "Correct rope_theta and rope_scaling in config.json, or remove the tensor from the file."
    if info.shape != tuple(expected.shape) or not info.dtype.is_floating_point:
        fact = f"tensor {name} is {info.dtype}{list(info.shape)}, config.json gives {len(expected)} frequencies."
        raise FxquantError(info.file, fact, way_out)
    stored = info.read().double()
    near = (stored - expected).abs() <= 4 * torch.finfo(info.dtype).eps * expected.abs() + SMALLEST
    if not bool(near.all()):
        index = int((~near).nonzero()[0])
        fact = f"tensor {name} has frequency {stored[index]:.7g} at {index}, config.json gives {expected[index]:.7g}."
        raise FxquantError(info.file, fact, way_out)
