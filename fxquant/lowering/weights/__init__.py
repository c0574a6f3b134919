"""Weights of an output: planned files that workers fill unit by unit; any order gives the same bytes."""

from fxquant.lowering.weights.producer import CheckpointProducer, Producer, tensor_bytes
from fxquant.lowering.weights.unit import Filled, Place, Unit, units_of
from fxquant.lowering.weights.work import WorkerKind, Workers, WorkReport, write_weights

__all__ = [
    "CheckpointProducer",
    "Filled",
    "Place",
    "Producer",
    "Unit",
    "WorkerKind",
    "WorkReport",
    "Workers",
    "tensor_bytes",
    "units_of",
    "write_weights",
]
