"""Schemes and recipes: how one linear is quantized, and which tensors it then owns on disk.

n out_features, k in_features, G = k / group_size. Formulas: `fxquant.kernels`; bytes: docs/formats.md.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch

from fxquant.errors import InternalError
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.weight_formats import WeightFormat

ROW_PARALLEL_CHUNKS = 16
"""scale_bias columns of a linear whose k is split over tensor-parallel ranks: 1, 2, 4, 8 and 16 divide it."""


class Activation(StrEnum):
    """How the input of a linear is quantized.

    FLOAT       not at all
    PER_TENSOR  int8, one calibrated scale and offset
    PER_TOKEN   int8, a scale per token, found while the model runs
    BOTH        the parameters of both: engines that split prefill from decode run it per token in prefill, per tensor
                in decode
    """

    FLOAT = "float"
    PER_TENSOR = "per_tensor"
    PER_TOKEN = "per_token"
    BOTH = "per_tensor_and_per_token"


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of a scheme: the bits of its weights (None: float), and how its inputs are quantized.

    grouped  whether groups of in_features may have second scales, whose `group_size` the policy gives
    """

    weight_bits: int | None
    activation: Activation
    grouped: bool = False


class Scheme(StrEnum):
    """Scheme names, as in policies and quant_model_description.json; `ARITHMETIC` defines them."""

    FLOAT = "FLOAT"
    W8A8 = "W8A8"
    W8A8_MIX = "W8A8_MIX"
    W8A8_DYNAMIC = "W8A8_DYNAMIC"
    W4A8_DYNAMIC = "W4A8_DYNAMIC"

    @property
    def weight_bits(self) -> int | None:
        """Bits per weight code; None: float weights."""
        return ARITHMETIC[self].weight_bits

    @property
    def activation(self) -> Activation:
        """How inputs are quantized."""
        return ARITHMETIC[self].activation

    @property
    def grouped(self) -> bool:
        """Whether groups of in_features may have second scales."""
        return ARITHMETIC[self].grouped

    @property
    def static(self) -> bool:
        """Whether it needs calibrated activation ranges."""
        return self.activation in (Activation.PER_TENSOR, Activation.BOTH)

    @property
    def integer_inputs(self) -> bool:
        """Whether linears multiply integers by integers."""
        return self.activation is not Activation.FLOAT


ARITHMETIC = {
    Scheme.FLOAT: Arithmetic(None, Activation.FLOAT),
    Scheme.W8A8: Arithmetic(8, Activation.PER_TENSOR),
    Scheme.W8A8_MIX: Arithmetic(8, Activation.BOTH),
    Scheme.W8A8_DYNAMIC: Arithmetic(8, Activation.PER_TOKEN),
    Scheme.W4A8_DYNAMIC: Arithmetic(4, Activation.PER_TOKEN, grouped=True),
}
"""Every scheme. Code that quantizes, stores, lowers or checks reads these properties, never the name."""


class WeightAlgorithm(StrEnum):
    """How the scales and integers of a weight are chosen; docs/policies.md compares them.

    MIN_MAX        the largest magnitude decides the scale
    CLIP           the scale with the least squared error, of a grid of scales up to that one
    LEAST_SQUARES  codes for the scale, then the scale for the codes, alternately, from several scales of the grid
    GPTQ           codes that compensate each other's errors on calibration activations
    """

    MIN_MAX = "min_max"
    CLIP = "clip"
    LEAST_SQUARES = "least_squares"
    GPTQ = "gptq"

    @property
    def scales(self) -> "WeightAlgorithm":
        """The algorithm that chooses its scales: itself, where codes follow from scales."""
        return SCALES[self]

    @property
    def from_inputs(self) -> bool:
        """Whether its codes depend on calibration inputs, not on the weight alone."""
        return self.scales is not self


SCALES = {
    WeightAlgorithm.MIN_MAX: WeightAlgorithm.MIN_MAX,
    WeightAlgorithm.CLIP: WeightAlgorithm.CLIP,
    WeightAlgorithm.LEAST_SQUARES: WeightAlgorithm.LEAST_SQUARES,
    WeightAlgorithm.GPTQ: WeightAlgorithm.LEAST_SQUARES,
}
"""Algorithm → the one that chooses its scales."""


@dataclass(frozen=True)
class ActivationRange:
    """Observed minimum and maximum of a linear's input, and the dtype in which scale and offset are formed."""

    low: float
    high: float
    arithmetic: torch.dtype = torch.float32


@dataclass(frozen=True)
class Recipe:
    """How the tensors of one linear, or of one projection of all experts of a layer, are made from the checkpoint.

    module         path in the graph: `model.layers.3.mlp.experts.gate_proj`
    modules        paths in the checkpoint and in the weight file, one per expert, or only `module`
    group_size     consecutive k that share an integer second scale; 0: one scale per output channel
    row_parallel   the linear reads features that an earlier linear of its block made (down_proj, o_proj)
    dtype          the model's dtype
    activation     calibrated range of the input, for static schemes, after the calibration pass
    weight_format  the format on disk
    scale_dtype    dtype in which its weight scales are representable, whatever dtype they are stored in
    algorithm      how scales and integers are chosen
    """

    module: str
    modules: tuple[str, ...]
    scheme: Scheme
    group_size: int
    out_features: int
    in_features: int
    bias: bool
    row_parallel: bool
    dtype: torch.dtype
    activation: ActivationRange | None = None
    weight_format: WeightFormat = WeightFormat.PACKED
    scale_dtype: torch.dtype = torch.float32
    algorithm: WeightAlgorithm = WeightAlgorithm.MIN_MAX

    @property
    def bits(self) -> int:
        """Bits of a code."""
        bits = self.scheme.weight_bits
        assert bits is not None, f"{self.module}: {self.scheme} has float weights"
        return bits

    @property
    def int4(self) -> bool:
        """Whether its weights have four bits."""
        return self.scheme.weight_bits == 4

    @property
    def weight_target(self) -> str:
        """Name of its weight in the graph."""
        return tensor_name(self.module, "weight")

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of its weights in the checkpoint, one for each of `modules`."""
        return tuple(tensor_name(module, "weight") for module in self.modules)

    @property
    def source_roles(self) -> tuple[str, ...]:
        """Roles of the checkpoint tensors that it reads from each of `modules`."""
        return ("weight", "bias") if self.bias else ("weight",)

    @property
    def highest_code(self) -> int:
        """The largest weight code c; the lowest is -c - 1. Raises InternalError for float weights."""
        if self.scheme.weight_bits is None:
            raise InternalError(self.module, f"{self.scheme} has no integer codes")
        return 2 ** (self.scheme.weight_bits - 1) - 1

    @property
    def scale_bias_columns(self) -> int:
        """Columns of `scale_bias`, which engines add to products of int8 and packed int4; 0 without one."""
        if not (self.int4 and self.weight_format.packed and self.scheme.integer_inputs):
            return 0
        return ROW_PARALLEL_CHUNKS if self.row_parallel else 1

    @property
    def source_names(self) -> tuple[str, ...]:
        """Every checkpoint tensor this recipe consumes."""
        return tuple(tensor_name(module, role) for module in self.modules for role in self.source_roles)


@dataclass(frozen=True)
class TensorSpec:
    """dtype, shape and description type of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    description: str

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_specs(recipe: Recipe) -> dict[str, TensorSpec]:
    """Role → spec of every tensor that each of `recipe.modules` owns in the weight file."""
    n, k = recipe.out_features, recipe.in_features
    parameter_dtype = torch.float32 if recipe.weight_format.float32_parameters else recipe.dtype
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight": (torch.int8, (n, k))}
    if recipe.scheme.activation is not Activation.PER_TENSOR or recipe.weight_format.static_weight_scale:
        specs["weight_scale"] = specs["weight_offset"] = (torch.float32, (n, 1))
    if recipe.scheme.static:
        specs["input_scale"] = specs["input_offset"] = (parameter_dtype, (1,))
        specs["quant_bias"] = (torch.int32, (n,))
        # for float16 models npu_quant_matmul takes int64, with the bits of a float32 in the low word
        specs["deq_scale"] = (torch.int64 if recipe.dtype is torch.float16 else torch.float32, (n,))
    if recipe.int4 and recipe.weight_format.packed:
        specs["weight"] = (torch.int8, (n // 2, k))
    elif recipe.int4 and recipe.weight_format is WeightFormat.BLOCKS:
        specs["weight"] = (torch.uint8, (n, k // 2))
    if recipe.scale_bias_columns:
        specs["scale_bias"] = (torch.float32, (n, recipe.scale_bias_columns))
    if recipe.int4 and recipe.group_size:
        groups = k // recipe.group_size
        specs["weight_scale_second"] = (torch.float32, (n, groups))
        specs["weight_offset_second"] = (torch.int64, (n, groups))
    if not recipe.weight_format.offsets:
        specs = {role: spec for role, spec in specs.items() if role not in ("weight_offset", "weight_offset_second")}
    described = {name: TensorSpec(*spec, recipe.scheme.value) for name, spec in specs.items()}
    if recipe.bias:
        described["bias"] = TensorSpec(parameter_dtype, (n,), Scheme.FLOAT.value)
    return described


def graph_spec(recipe: Recipe, role: str) -> TensorSpec:
    """dtype and shape of a tensor of `recipe` in the graph: as stored, but int4 always packed."""
    spec = tensor_specs(recipe)[role]
    if role == "weight" and recipe.int4 and not recipe.weight_format.packed:
        return TensorSpec(torch.int8, (recipe.out_features // 2, recipe.in_features), spec.description)
    return spec


BLOCK_SIZES = (256, 128, 64, 32, 16)
"""Numbers of in_features to a scale for which ONNX Runtime has kernels, fastest first."""


def block_size(recipe: Recipe) -> int | None:
    """The largest of `BLOCK_SIZES` that divides the groups, or without groups the row; None if there is none."""
    width = recipe.group_size or recipe.in_features
    return next((size for size in BLOCK_SIZES if width % size == 0), None)


def why_not(recipe: Recipe) -> str | None:
    """None if the scheme fits the linear's shape, else the reason with the numbers."""
    n, k, group_size = recipe.out_features, recipe.in_features, recipe.group_size
    if not recipe.int4:
        return None
    if n % 2:
        return f"out_features {n} is odd, but int4 rows are packed in pairs"
    if group_size and k % group_size:
        return f"in_features {k} is not a multiple of group_size {group_size}"
    if recipe.row_parallel and recipe.scheme.integer_inputs and k % ROW_PARALLEL_CHUNKS:
        return f"in_features {k} is not a multiple of {ROW_PARALLEL_CHUNKS}, the number of chunks of scale_bias"
    return None
