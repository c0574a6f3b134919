"""Decoder layers of a user's own that several tests compile."""

from torch import Tensor

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.models import DecoderLayer, RMSNorm


class ExtraNorm(DecoderLayer):
    """One more norm before the attention's residual."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        self.extra_norm = RMSNorm(config.hidden_size, 1e-5)

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.extra_norm(x), *rest)


class ScaledResidual(DecoderLayer):
    """What the layer adds counts half."""

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        y, present = super().forward(x, *rest)
        return x + (y - x) * 0.5, present
