"""Config-only checkpoint: the tensors that a config.json describes, with names, dtypes and shapes of official ones."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.checkpoint.index import SCALE_SUFFIX
from fxquant.models.deepseek_v3 import mtp_paths
from fxquant.models.mtp import mtp_gate_biases, mtp_linears, mtp_tensors
from fxquant.policy.kinds import Kind
from fxquant.program.linears import linear_sites
from fxquant.program.operands import operand_node
from fxquant.program.program import Program
from fxquant.schemes.roles import tensor_name
from fxquant.storage.safetensors import TensorInfo

IN_MODEL_DTYPE = (Kind.HEAD, Kind.MTP)
"""Linears that official FP8 checkpoints keep in the model's dtype: the head, and `eh_proj` of a prediction layer."""


def config_checkpoint(checkpoint: Checkpoint, program: Program, config: DeepseekV3Config) -> Checkpoint:
    """`checkpoint`, which is a config.json, with the tensors that its float `program` and its prediction layers need.

    All are in the model's dtype, correction biases in float32. If the config says FP8, weights [n, k] of linears are
    FP8 E4M3 with float32 scales [ceil(n / rows), ceil(k / columns)] of `checkpoint.block`. Nothing can be read: the
    tensors of a stack share one `TensorInfo`, which has the first one's name and no place in a file.
    """
    fp8 = set(_fp8_weights(program, config)) if checkpoint.config.get("quantization_config") else set()
    biases = set(_gate_biases(program, config))
    tensors: dict[str, TensorInfo] = {}
    scales: dict[str, TensorInfo] = {}
    groups = [*_traced(program), *(group for path in mtp_paths(config) for group in mtp_tensors(config, path))]
    for names, shape in groups:
        first, dtype = names[0], torch.float32 if names[0] in biases else checkpoint.dtype
        if first in fp8:
            dtype = torch.float8_e4m3fn
            blocks = tuple(-(-edge // size) for edge, size in zip(shape, checkpoint.block, strict=True))
            scale = _info(checkpoint, f"{first}{SCALE_SUFFIX}", torch.float32, blocks)
            scales |= dict.fromkeys(names, scale)
        tensors |= dict.fromkeys(names, _info(checkpoint, first, dtype, shape))
    return replace(checkpoint, tensors=tensors, scales=scales)


def _info(checkpoint: Checkpoint, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, dtype, shape, checkpoint.folder, 0, math.prod(shape) * dtype.itemsize)


def _traced(program: Program) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """For each parameter of the graph, its checkpoint tensors and their common shape."""
    for target, parameter in program.parameters.items():
        shape = tuple(program.graph.tensor(target).shape)
        yield parameter.names, shape[1:] if parameter.stacked else shape


def _fp8_weights(program: Program, config: DeepseekV3Config) -> Iterator[str]:
    """The first tensor of each linear or stack."""
    for site in linear_sites(program):
        if site.kind not in IN_MODEL_DTYPE:
            yield site.parameter.names[0]
    for path in mtp_paths(config):
        for linear in mtp_linears(config, path):
            if linear.kind not in IN_MODEL_DTYPE:
                yield tensor_name(linear.modules[0], "weight")


def _gate_biases(program: Program, config: DeepseekV3Config) -> Iterator[str]:
    for node in program.nodes(ops.moe_gate):
        yield from program.parameters[str(operand_node(node, "correction_bias").target)].names
    for path in mtp_paths(config):
        yield from mtp_gate_biases(config, path)
