"""Adapter request: the error for a class that needs an adapter, with an adapter to paste."""

import inspect

from torch import nn

from fxquant.errors import FxquantError


def forward_owner(module: nn.Module) -> type[nn.Module]:
    """The class that defines the forward of `module`."""
    return next(cls for cls in type(module).__mro__ if "forward" in vars(cls))


RULE = "A forward keeps shapes and control flow free of tensor values, and does not write into its inputs. "


def undeclared(path: str, module: nn.Module, what: str, rule: str = RULE) -> FxquantError:
    """`what` the module at `path` does, its class, and the adapter that it needs, ready to paste."""
    name = type(module).__name__
    declare = f"If {name} computes what a part of DeepSeek-V3 does, declare it in the model file:"
    return FxquantError(path or name, f"{name} {what}.", f"{rule}{declare}\n\n{skeleton(module)}")


def skeleton(module: nn.Module) -> str:
    """LEAVES with an adapter for the class of `module`: attention if it projects to latents, MoE if it holds a list of
    modules, else a function that returns a replacement."""
    name = type(module).__name__
    if "kv_a_proj_with_mqa" in module._modules:
        return f"    from fxquant import adapters\n    LEAVES = {{{name}: adapters.Attention()}}"
    lists = [child for child, held in module._modules.items() if isinstance(held, nn.ModuleList)]
    others = [child for child, held in module._modules.items() if held is not None and child not in lists]
    if lists:
        hint = f"  # it has {', '.join(others)}" if others else ""
        call = f'adapters.MoE(gate_weight="gate.weight", experts="{lists[0]}", shared_experts=None)'
        return f"    from fxquant import adapters\n    LEAVES = {{{name}: {call}}}{hint}"
    arguments = list(inspect.signature(forward_owner(module).forward).parameters)
    return "\n".join(
        f"    {line}"
        for line in (
            f"class Traced{name}(nn.Module):",
            f"    def __init__(self, own: {name}):",
            "        super().__init__()",
            "        ...  # take over the parameters of own, under their names in the checkpoint",
            f"    def forward({', '.join(arguments)}):",
            "        ...  # torch and fxquant.ops only, no branch on a tensor's value",
            f"LEAVES = {{{name}: lambda own, adaptation: Traced{name}(own)}}",
        )
    )
