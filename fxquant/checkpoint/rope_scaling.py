"""YaRN parameters of a config.json, and the attention temperature that follows from them."""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from fxquant.checkpoint.config_sizes import Positions, RotaryScale, YarnBeta, YarnFactor, YarnScale


class RopeScaling(BaseModel):
    """YaRN parameters with DeepSeek's names (arXiv:2309.00071), and the two that transformers adds.

    attention_factor  factor of cos and sin; None: it follows from the two mscales
    truncate          whether the bounds of the interpolated frequencies are rounded outwards to whole ones
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)
    type: Literal["yarn"]
    factor: YarnFactor
    original_max_position_embeddings: Positions = 4096
    beta_fast: YarnBeta = 32.0
    beta_slow: YarnBeta = 1.0
    mscale: YarnScale | None = None
    mscale_all_dim: YarnScale | None = None
    attention_factor: RotaryScale | None = None
    truncate: bool = True

    @model_serializer(mode="wrap")
    def _given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Absent keys stay absent: DeepSeek's own code reads a key that is there, and takes no null."""
        return {key: value for key, value in dump(self).items() if value is not None}

    @property
    def rotary_scale(self) -> float:
        """Factor of cos and sin: `attention_factor`, else `mscale(factor, mscale) / mscale(factor, mscale_all_dim)`.

        As in transformers, an mscale without the other counts as none of them: then it is `mscale(factor, 1)`.
        """
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN: `0.1 * mscale * ln(factor) + 1` for factor > 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
