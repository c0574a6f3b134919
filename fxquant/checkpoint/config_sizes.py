"""How large each number of a config may be."""

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
"""YaRN divides by its logarithm."""
YarnFactor = Annotated[float, Field(ge=1e-3, le=1e6)]
YarnBeta = Annotated[float, Field(ge=1e-6, le=1e6)]
"""Turns, divided by and their logarithm taken: a smaller one overflows."""
YarnScale = Annotated[float, Field(ge=0, le=100)]
