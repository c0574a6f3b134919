"""Wide copy: logits of the graph against those of the own forward, to rounding."""

from torch import Tensor, nn

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.frontend.user_file import UserFile


def rounding_bound(config: DeepseekV3Config, logits: Tensor) -> float:
    """For two forms of one function in float32: two blocks per layer each sum up to `width` products, whose rounding
    errors of 2**-24 of the sum add up like a random walk, differently in the two; times two for either side."""
    width = max(config.hidden_size, config.intermediate_size, config.num_attention_heads * config.v_head_dim)
    return 2 * 2 * config.num_hidden_layers * width**0.5 * 2.0**-24 * float(logits.abs().max())


def compare_logits(
    file: UserFile, model: nn.Module, expected: Tensor, traced: Tensor, config: DeepseekV3Config
) -> None:
    """Raise FxquantError if they differ by more than rounding."""
    error, bound = float((expected - traced).abs().max()), rounding_bound(config, expected)
    if not error <= bound:  # not `>`: NaN must fail
        fact = f"a small copy of {type(model).__name__} gives logits that "
        fact += f"differ from the traced graph's by {error:.2g} (rounding explains {bound:.2g})."
        if not expected.isfinite().all():
            fact = f"a small copy of {type(model).__name__} gives logits that are not finite."
        way_out = "Export or an adapter loses something: keep control flow free of sizes and values, and let a class "
        way_out += "in LEAVES compute what its adapter says."
        raise FxquantError(file.path, fact, way_out)
