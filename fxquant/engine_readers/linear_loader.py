"""Linear loader: linears outside the routed experts, and int8 and float experts; engines load them much alike."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.engine_readers.activation import PerTensor, PerToken
from fxquant.engine_readers.arithmetic import half_step
from fxquant.engine_readers.float_linear import FloatLinear
from fxquant.engine_readers.folder import Expected, WeightFolder
from fxquant.engine_readers.int8_shards import PerTokenShard, StaticShard
from fxquant.engine_readers.ranks import Loaded, Ranks, Shard
from fxquant.engine_readers.split import Split
from fxquant.errors import FxquantError

FLOAT, W8A8, W8A8_DYNAMIC, W8A8_MIX, W4A8_DYNAMIC = "FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W4A8_DYNAMIC"


@dataclass(frozen=True)
class LinearRules:
    """Where engines differ.

    reciprocal      static activations are multiplied by the reciprocal of input_scale
    narrow_scale    the weight_scale of per-token linears is held in the model's dtype
    biased          per-token linears add `.bias`; else it is skipped on load
    """

    reciprocal: bool
    narrow_scale: bool
    biased: bool


@dataclass(frozen=True)
class MixedLinear(Ranks):
    """W8A8_MIX: itself per token, for prefill; `decode` is static, for decoding."""

    decode: Ranks


def load_linear(
    folder: WeightFolder, rules: LinearRules, module: str, split: Split, read_as: str | None = None
) -> Loaded:
    """One linear of type FLOAT, W8A8, W8A8_DYNAMIC or W8A8_MIX; `read_as`: the type under which the engine reads it,
    if that is not the described one."""
    described = folder.type_of(module)
    kind = read_as or described
    shape = folder.shape(f"{module}.weight")
    if len(shape) != 2:
        raise FxquantError(
            f"{module}.weight", f"has shape {list(shape)}, a linear has two dimensions.", "Write [n, k]."
        )
    stored = {name: replace(want, required=False) for name, want in _expected(described, shape, folder.dtype).items()}
    tensors = folder.load(module, stored | _expected(kind, shape, folder.dtype))
    if kind == FLOAT:
        return FloatLinear(tensors["weight"], tensors.get("bias"), folder.dtype)
    loaders = {W8A8: _static, W8A8_DYNAMIC: _per_token}
    if kind in loaders:
        return loaders[kind](folder, rules, module, tensors, split)
    prefill = _per_token(folder, rules, module, tensors, split)
    decode = _static(folder, rules, module, tensors, split)
    return MixedLinear(prefill.shards, prefill.row_parallel, prefill.activation, prefill.dtype, decode)


def _expected(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Expected]:
    """The parameters an engine allocates; float ones it casts to their dtype, and a static one may lack what no
    operator reads."""
    n = shape[0]
    bias = {"bias": Expected((n,), (dtype, torch.float32), required=False)}
    if kind == FLOAT:
        return {"weight": Expected(shape, (torch.bfloat16, torch.float16, torch.float32))} | bias
    used = kind != W8A8
    parameters = {
        "weight": Expected(shape, (torch.int8,)),
        "weight_scale": Expected((n, 1), (torch.float32,), used),
        "weight_offset": Expected((n, 1), (torch.float32,), used),
    }
    if kind != W8A8_DYNAMIC:
        parameters |= {
            "input_scale": Expected((1,), (dtype, torch.float32)),
            "input_offset": Expected((1,), (dtype, torch.float32)),
            "quant_bias": Expected((n,), (torch.int32,)),
            "deq_scale": Expected((n,), (torch.int64 if dtype is torch.float16 else torch.float32,)),
        }
    return parameters | bias


def _static(folder: WeightFolder, rules: LinearRules, module: str, tensors: dict[str, Tensor], split: Split) -> Ranks:
    offset = tensors["input_offset"].float()
    if not torch.equal(offset, offset.round().clamp(-128, 127)):
        raise FxquantError(
            f"{module}.input_offset", f"is {offset.item()}, engines hold it as int8.", "Calibrate again."
        )
    activation = PerTensor(tensors["input_scale"].to(folder.dtype), offset.to(folder.dtype), rules.reciprocal)

    def shard(rank: int, rows: slice, inner: slice) -> Shard:
        # the results of row-parallel ranks are summed, so only one of them adds the bias
        bias = tensors["quant_bias"][rows] if rank == 0 or not split.row_parallel else None
        return StaticShard(tensors["weight"][rows, inner].T, tensors["deq_scale"][rows], bias)

    return _ranks(module, tensors["weight"], split, shard, activation, folder.dtype)


def _per_token(
    folder: WeightFolder, rules: LinearRules, module: str, tensors: dict[str, Tensor], split: Split
) -> Ranks:
    stored = tensors["weight_scale"].flatten()
    held = folder.dtype if rules.narrow_scale else torch.float32
    bias = tensors.get("bias")
    if bias is not None and not rules.biased:
        if bias.any():
            fact = "the engine skips the bias of a quantized linear; only quant_bias of a static one can hold it."
            raise FxquantError(f"{module}.bias", fact, "Use W8A8 for it.")
        bias = None

    def shard(rank: int, rows: slice, inner: slice) -> Shard:
        own = bias[rows] if bias is not None and (rank == 0 or not split.row_parallel) else None
        scale = stored[rows]
        weight = tensors["weight"][rows, inner].T
        return PerTokenShard(weight, scale.to(held), half_step(scale, held), own)

    return _ranks(module, tensors["weight"], split, shard, PerToken(folder.dtype), folder.dtype)


def _ranks(
    module: str,
    weight: Tensor,
    split: Split,
    shard: Callable[[int, slice, slice], Shard],
    activation: PerTensor | PerToken,
    dtype: torch.dtype,
) -> Ranks:
    places = split.places(module, *weight.shape)
    return Ranks(tuple(shard(*place) for place in places), split.row_parallel, activation, dtype)
