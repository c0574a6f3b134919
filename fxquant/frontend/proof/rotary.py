"""Rotary tables: the model's own, at every position of its context, against those of the graph."""

import torch
from torch import Tensor, nn

from fxquant import ops
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.frontend.families import family_of
from fxquant.frontend.user_file import UserFile
from fxquant.models import rotary

BLOCK = 16384
"""Positions at a time."""
REMEDY = "The model makes its own angles: keep its rotary settings those of config.json, or change both."


def compare_rotary(file: UserFile, model: nn.Module, config: DeepseekV3Config) -> None:
    """Raise FxquantError where cosines or sines of a table differ, at a position of the context, by more than the
    rounding of the angle, position · 2⁻²²."""
    family = family_of(model)
    if family is None:
        return
    frequencies, factor = rotary.frequencies(config), rotary.attention_factor(config)
    for positions in torch.arange(config.max_position_embeddings).split(BLOCK):
        ours = [table[0] for table in ops.rope_table(positions[None], frequencies, factor)]
        for table in family.rotary(model, positions):
            for theirs, expected in zip(table, ours, strict=True):
                _compare(file, theirs.float(), expected[: len(theirs), : theirs.shape[-1]], positions)


def _compare(file: UserFile, theirs: Tensor, ours: Tensor, positions: Tensor) -> None:
    error = (theirs - ours).abs().amax(-1)
    wrong = (error > (positions[: len(error)] + 16) * 2.0**-22).nonzero()
    if len(wrong):
        place = int(wrong[0])
        fact = f"its rotary table differs from that of config.json by {float(error[place]):.2g} "
        raise FxquantError(file.path, f"{fact}at position {int(positions[place])}.", REMEDY)
