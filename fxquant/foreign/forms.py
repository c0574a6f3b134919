"""Forms of a found folder: which of the weight formats its tensors can be."""

from collections.abc import Iterable
from math import prod

import torch

from fxquant.foreign.found import FoundFolder
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Scheme
from fxquant.schemes.weight_formats import WeightFormat


def group_size(found: FoundFolder, modules: Iterable[str]) -> dict[int, str]:
    """Group size, from the shapes of second scales (0: there are none) → the first int4 module that has it."""
    sizes: dict[int, str] = {}
    for module in modules:
        name = tensor_name(module, "weight")
        if found.types.get(name) == Scheme.W4A8_DYNAMIC and name in found.infos and found.infos[name].shape:
            sizes.setdefault(group_size_of(found, module), module)
    return sizes


def group_size_of(found: FoundFolder, module: str) -> int:
    """in_features by second scale; 0 without one, or if shapes do not fit."""
    weight = found.infos.get(tensor_name(module, "weight"))
    second = found.infos.get(tensor_name(module, "weight_scale_second"))
    if weight is None or second is None or not weight.shape or len(second.shape) != 2 or not prod(second.shape):
        return 0
    return weight.shape[-1] // second.shape[1]


def possible_forms(found: FoundFolder, dtype: torch.dtype, out_features: dict[str, int]) -> set[WeightFormat]:
    """The formats in which every quantized module has its tensors; `dtype`: the model's; module → its out_features."""
    forms = set(WeightFormat) - {WeightFormat.BLOCKS}  # ours alone: nobody else writes such folders
    roles = found.roles
    for module in out_features:
        kind = found.types.get(tensor_name(module, "weight"))
        own = roles.get(module, frozenset())
        weight = found.infos.get(tensor_name(module, "weight"))
        if kind == Scheme.W4A8_DYNAMIC and weight is not None and weight.shape:
            packed = weight.shape[0] < out_features[module]
            forms &= {WeightFormat.PACKED, WeightFormat.PER_CHANNEL} if packed else {WeightFormat.UNPACKED}
        if "weight_scale_second" in own:
            forms -= {WeightFormat.PER_CHANNEL}
        if kind == Scheme.W8A8:
            stored = "weight_scale" in own
            forms = {form for form in forms if form.static_weight_scale is stored}
        for role in ("bias", "input_scale") if kind in list(Scheme) and kind != Scheme.FLOAT else ():
            if role in own and dtype is not torch.float32:
                wide = found.infos[tensor_name(module, role)].dtype is torch.float32
                forms = {form for form in forms if form.float32_parameters is wide}
    return forms
