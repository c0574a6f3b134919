"""Plain experts: what a list of experts must be for their stacked weights to be all that they compute."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxquant.frontend.recognition.published import changed, is_torch

ROWS = 3


def members(experts: Any) -> Iterator[tuple[str, Any]]:
    """Each expert of a list with its number, or the one module that holds them all."""
    if isinstance(experts, nn.ModuleList):
        yield from ((f"expert {number}", expert) for number, expert in enumerate(experts))
    else:
        yield "the module of its experts", experts


def not_plain(expert: nn.Module) -> str:
    """What a part of `expert` with weights does besides `x @ weight.T`, "" if nothing."""
    for name, part in expert._modules.items():
        if part is None or not any(True for _ in part.parameters()):
            continue
        attached = changed(part)
        if attached is not None:
            return f"its {name} has {attached}"
        if getattr(part, "bias", None) is not None:
            return f"its {name} has a bias"
        if not is_plain_linear(part):
            return f"its {name} is a {type(part).__name__}, whose forward is not one product with its weight"
    return ""


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the forward of `module`, at its sizes, is `x @ weight.T` and its bias, if it has one."""
    if is_torch(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and changed(module) is None and _is_one_product(
        _ByForward(module)
    )  # fmt: skip


class _ByForward:
    """A module, equal to others of its class, sizes and device: a large model has tens of thousands."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        weight: Any = module.weight
        bias = getattr(module, "bias", None) is not None
        self.key = (type(module), type(module).forward, tuple(weight.shape), weight.device, bias)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByForward) and self.key == other.key


@cache
def _is_one_product(held: _ByForward) -> bool:
    module = held.module
    weight: Any = module.weight
    given = torch.empty(ROWS, weight.shape[1], device="meta")
    meta: dict[str, Tensor] = {
        name: nn.Parameter(torch.empty_like(tensor, device="meta", dtype=torch.float32), requires_grad=False)
        for name, tensor in module.named_parameters()
    }
    calls = _Calls()
    try:
        with torch.no_grad(), calls:
            result = torch.func.functional_call(module, meta, (given,))
    except Exception:  # whatever it needs, it is no plain product
        return False
    made = [(function, arguments) for function, arguments, value in calls.seen if value is result]
    products = [arguments for function, arguments in made if function is nn.functional.linear]
    return (
        len(calls.seen) == len(products) == 1
        and products[0][0] is given
        and products[0][1] is meta.get("weight")
        and (products[0][2] if len(products[0]) > 2 else None) is meta.get("bias")
    )


class _Calls(TorchFunctionMode):
    """Calls that give tensors: (function, arguments, value)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and getattr(func, "__name__", "") != "__get__":
            self.seen.append((func, (*args, *(kwargs or {}).values()), result))
        return result
