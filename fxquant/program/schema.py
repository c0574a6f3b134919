"""Graph file schema: names are identifiers or paths, numbers are bounded, and no other field is accepted."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fxquant.errors import FxquantError
from fxquant.inputs.limits import NAME_LENGTH, NODES, RANK, SIZE
from fxquant.inputs.validation import validation_fact
from fxquant.policy.kinds import Kind
from fxquant.program.node_names import is_name
from fxquant.schemes.schemes import Scheme, WeightAlgorithm
from fxquant.schemes.weight_formats import WeightFormat
from fxquant.storage.safetensors import DTYPES

FORMAT = 2
AGAIN = "Compile again."
PLACE = re.compile(r"[\w.\-]*", re.ASCII)
"""Dotted paths: these become source text of the Ascend module, so nothing else may pass."""
SYMBOLS = {"batch": 1009, "sequence": 1013, "past": 1019, "total": 2032}
"""Sizes at which a program that is read back is checked: no model has them, and total = past + sequence."""


def _place(text: str) -> str:
    if len(text) > NAME_LENGTH or not PLACE.fullmatch(text):
        raise ValueError(f"name {text[:NAME_LENGTH]!r}")
    return text


def _identifier(text: str) -> str:
    if len(text) > NAME_LENGTH or not is_name(text):
        raise ValueError(f"name {text[:NAME_LENGTH]!r}")
    return text


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise ValueError(f"dtype {text[:NAME_LENGTH]!r}")
    return text


Place = Annotated[str, AfterValidator(_place)]
Identifier = Annotated[str, AfterValidator(_identifier)]
StoredDtype = Annotated[str, AfterValidator(_dtype)]
ModelDtype = Literal["BF16", "F16", "F32"]
Count = Annotated[int, Field(ge=0, lt=SIZE)]
Size = Annotated[int, Field(ge=1, lt=SIZE)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Places = Annotated[list[Place], Field(max_length=NODES)]
KindName = Annotated[Kind, Field(strict=False)]


class Fields(BaseModel):
    """Types are not converted, and no other key is accepted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ParameterFields(Fields):
    """A tensor of the graph."""

    names: Annotated[list[Place], Field(min_length=1, max_length=NODES)]
    module: Place
    kind: KindName
    stacked: bool
    dtype: StoredDtype
    shape: Annotated[list[Count], Field(max_length=RANK)]


class RecipeFields(Fields):
    """How stored tensors are made."""

    group_size: Count
    out_features: Size
    in_features: Size
    bias: bool
    row_parallel: bool
    scheme: Annotated[Scheme, Field(strict=False)]
    dtype: ModelDtype
    weight_format: Annotated[WeightFormat, Field(strict=False)]
    scale_dtype: ModelDtype
    algorithm: Annotated[WeightAlgorithm, Field(strict=False)] = WeightAlgorithm.MIN_MAX
    activation: Annotated[tuple[Finite, Finite, ModelDtype], Field(strict=False)] | None = None
    modules: Annotated[list[Place], Field(min_length=1, max_length=NODES)]


class MtpFields(Fields):
    """Multi-token prediction layers."""

    layers: Places
    recipes: Annotated[dict[Place, RecipeFields], Field(max_length=NODES)]
    float_tensors: Annotated[dict[Place, Place], Field(max_length=NODES)]
    gate_biases: Places


class NodeFields(Fields):
    """A node; the builder checks its arguments against its operator."""

    name: Identifier
    op: Literal["placeholder", "get_attr", "call_function", "output"]
    target: Annotated[str, Field(max_length=NAME_LENGTH)]
    args: list[Any]
    kwargs: dict[str, Any] | None = None
    dtype: Annotated[str, Field(max_length=NAME_LENGTH)] | None = None
    shape: Annotated[list[Any], Field(max_length=RANK)] | None = None
    module: Place
    kind: KindName
    block: Place


class Document(Fields):
    """The whole file."""

    format: Literal[2]
    dtype: ModelDtype
    config: dict[str, Any]
    parameters: Annotated[dict[Place, ParameterFields], Field(max_length=NODES)]
    recipes: Annotated[dict[Place, RecipeFields], Field(max_length=NODES)]
    rules: Annotated[dict[Place, dict[str, Any]], Field(max_length=NODES)]
    mtp: MtpFields
    rotated_stream: Count = 0
    nodes: Annotated[list[NodeFields], Field(max_length=NODES)]


def read_fields(value: Any, place: object) -> Document:
    """The document of a JSON `value`. Raises FxquantError, naming `place`, for an invalid field."""
    if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
        raise FxquantError(place, f"format {str(value['format'])[:40]}.", "Compile again with this version.")
    try:
        return Document.model_validate(value)
    except ValidationError as error:
        fact = validation_fact(error, Document, value, 1)
        raise FxquantError(place, f"not a program of fxquant: {fact}", AGAIN) from None
