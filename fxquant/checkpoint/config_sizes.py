"""Config number types: the range that each number of a config may have."""

from typing import Annotated

from pydantic import Field

from fxquant.inputs import limits

Size = Annotated[int, Field(gt=0, le=limits.WIDTH)]
Layers = Annotated[int, Field(gt=0, le=limits.LAYERS)]
DenseLayers = Annotated[int, Field(ge=0, le=limits.LAYERS)]
MtpLayers = Annotated[int, Field(ge=0, le=limits.MTP_LAYERS)]
Heads = Annotated[int, Field(gt=0, le=limits.HEADS)]
Experts = Annotated[int, Field(gt=0, le=limits.EXPERTS)]
SharedExperts = Annotated[int, Field(ge=0, le=limits.EXPERTS)]
Positions = Annotated[int, Field(gt=0, le=limits.POSITIONS)]
TokenId = Annotated[int, Field(ge=-(2**31), lt=2**31)]
NormEps = Annotated[float, Field(ge=0, le=1)]
RouteScale = Annotated[float, Field(gt=0, le=1e6)]
RopeTheta = Annotated[float, Field(gt=1, le=1e12)]
"""Above 1, as YaRN divides by its logarithm."""
YarnFactor = Annotated[float, Field(ge=1e-3, le=1e6)]
YarnBeta = Annotated[float, Field(ge=1e-6, le=1e6)]
"""Number of rotations. YaRN divides by it and takes its logarithm: a smaller one overflows."""
YarnScale = Annotated[float, Field(ge=0, le=100)]
RotaryScale = Annotated[float, Field(gt=0, le=1e6)]
"""Factor of cos and sin: with 0 positions would count for nothing."""
