"""Prediction graph: the multi-token prediction layers as a program of their own, which calibration runs."""

import torch

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.models.mtp import Predictors
from fxquant.program.program import Program
from fxquant.tracing.export import trace
from fxquant.tracing.inputs import prediction_inputs


def trace_predictors(config: DeepseekV3Config, checkpoint: Checkpoint) -> Program:
    """The float graph of all prediction layers that `config` announces; inputs as of `Predictors.forward`, flat."""
    with torch.device("meta"):
        model = Predictors(config)
    return trace(model, checkpoint, prediction_inputs(config))
