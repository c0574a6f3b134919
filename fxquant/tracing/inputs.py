"""Trace inputs: example tensors on meta, and which of their sizes are dynamic."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils._pytree import tree_map_only

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError

SIZES = ((2, 3, 5), (1, 1, 1_000_037), (3, 2, 0), (7, 1_000_003, 1_000_033))
"""Example batch, sequence and past. The first are traced: distinct and above one, so that none is taken for a constant.
All are run and compared: a single token far on, an empty cache, and inputs longer than any threshold in a forward."""
PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call per run; all must take the same path, and the first is traced with `dynamic_shapes`."""

    runs: tuple[tuple[Any, ...], ...]
    dynamic_shapes: Any


def standard_inputs(config: DeepseekV3Config, depth: int) -> Inputs:
    """Token ids, mask and positions int64, and one latent for each of `depth` layers."""
    return Inputs(tuple(_standard(config, depth, *sizes) for sizes in SIZES), _shapes(depth))


def prediction_inputs(config: DeepseekV3Config) -> Inputs:
    """Mask, positions, of each prediction layer a latent and the ids of later tokens, and hidden states."""
    depth, runs = config.num_nextn_predict_layers, []
    for sizes in SIZES:
        ids, mask, positions, past = _standard(config, depth, *sizes)
        with torch.device("meta"):
            hidden = torch.zeros(*ids.shape, config.hidden_size)
            runs.append((mask, positions, past, [torch.empty_like(ids) for _ in range(depth)], hidden))
    by_row, mask_shape, _, past_shapes = _shapes(depth)
    return Inputs(tuple(runs), (mask_shape, by_row, past_shapes, [by_row] * depth, by_row))


def declared_inputs(
    model: nn.Module,
    example_inputs: Callable[[nn.Module, str], Any],
    dynamic_shapes: Callable[[str], Any] | None,
) -> Inputs:
    """The inputs that a model file declares. Raises FxquantError unless they are `(args, kwargs)` of the forward."""
    signature, runs = inspect.signature(model.forward), []
    for phase in PHASES:
        try:
            with torch.device("meta"):
                args, kwargs = example_inputs(model, phase)
            # an input given twice would be traced as one
            runs.append(tree_map_only(Tensor, torch.empty_like, signature.bind(*args, **kwargs).args))
        except (TypeError, ValueError) as error:
            place = f"example_inputs(model, {phase!r})"
            fact = f"returned no valid (args, kwargs) for {type(model).__name__}.forward: {error}."
            raise FxquantError(place, fact, "Return a tuple and a dict.") from error
    shapes = dynamic_shapes(PHASES[0]) if dynamic_shapes else _shapes(len(runs[0][3]))
    return Inputs(tuple(runs), shapes)


def check_dynamic(graph: fx.Graph) -> None:
    """Raise FxquantError for an input whose first two sizes are not both dynamic: the graph serves any request."""
    for node in graph.find_nodes(op="placeholder"):
        for name, size in zip(("rows", "positions"), node.meta["val"].shape, strict=False):
            if not isinstance(size, torch.SymInt):
                fact = f"leaves the {name} of {node.name} fixed at {size}."
                raise FxquantError("dynamic_shapes", fact, "Make the first two sizes of every input dynamic.")


def _standard(
    config: DeepseekV3Config, depth: int, batch: int, sequence: int, past: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    with torch.device("meta"):
        ids = torch.zeros(batch, sequence, dtype=torch.int64)
        mask = torch.zeros(batch, sequence + past, dtype=torch.int64)
        width = config.kv_lora_rank + config.qk_rope_head_dim
        return ids, mask, ids.clone(), [torch.zeros(batch, past, width) for _ in range(depth)]


def _shapes(depth: int) -> Any:
    batch, sequence, total, length = Dim("batch"), Dim("sequence"), Dim("total"), Dim("past")
    by_row = ({0: batch, 1: sequence}, {0: batch, 1: total}, {0: batch, 1: sequence})
    return (*by_row, [{0: batch, 1: length}] * depth)
