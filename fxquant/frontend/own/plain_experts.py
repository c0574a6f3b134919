"""Plain experts: what a list of experts must be for their stacked weights to be all that they compute."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxquant.frontend.recognition.published import changed, is_torch

ROWS = 3
LINEAR = nn.functional.linear


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
    """A module, equal to others of its class, plain attributes, sizes and device: a model has tens of thousands."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        weight: Any = module.weight
        plain = ((name, value) for name, value in vars(module).items() if isinstance(value, bool | int | float | str))
        held = (tuple(sorted(plain)), getattr(module, "bias", None) is not None)
        self.key = (type(module), type(module).forward, tuple(weight.shape), weight.device, held)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByForward) and self.key == other.key


@cache
def _is_one_product(held: _ByForward) -> bool:
    recorded = _recorded(held.module)
    if recorded is None or len(recorded.calls) != 1:
        return False
    ((function, arguments, value),) = recorded.calls
    weights = [recorded.weights["weight"], *([recorded.weights["bias"]] if "bias" in recorded.weights else [])]
    given = [each for each in arguments if each is not None]
    return function is LINEAR and value is recorded.result and _same(given, [recorded.given, *weights])


def swiglu_weights(expert: nn.Module) -> dict[str, str] | None:
    """Where an expert has gate_proj, up_proj [I, H] and down_proj [H, I], if all that it computes at its sizes is
    `down(silu(gate x) * up x)`; None if it is not."""
    if any(changed(module) for module in expert.modules()):
        return None
    recorded = _recorded(expert)
    if recorded is None or len(recorded.calls) != 5:
        return None
    paths = {id(weight): path for path, weight in recorded.weights.items()}
    made = {id(value): (function, [each for each in arguments if isinstance(each, Tensor)])
            for function, arguments, value in recorded.calls}  # fmt: skip
    match made.get(id(recorded.result)):
        case (function, [product, down]) if function is LINEAR and id(down) in paths:
            names = _gate_and_up(made, product, recorded.given)
            weights = [*(names or ()), down]
            if names is not None and all(id(weight) in paths for weight in weights):
                return dict(
                    zip(("gate_proj", "up_proj", "down_proj"), (paths[id(each)] for each in weights), strict=True)
                )
    return None


def _gate_and_up(made: dict[int, tuple[Any, list[Tensor]]], product: Tensor, x: Tensor) -> list[Tensor] | None:
    """The weights of `silu(x @ gate.T) * (x @ up.T)`, in either order."""
    function, factors = made.get(id(product), (None, []))
    if getattr(function, "__name__", "") not in ("mul", "__mul__") or len(factors) != 2:
        return None
    for activated, up in (factors, factors[::-1]):
        silu, inner = made.get(id(activated), (None, []))
        if silu is not nn.functional.silu or len(inner) != 1:
            continue
        sides = [made.get(id(side), (None, [])) for side in (inner[0], up)]
        if all(side is LINEAR and len(given) == 2 and given[0] is x for side, given in sides):
            return [given[1] for _, given in sides]
    return None


@dataclass(frozen=True)
class _Recorded:
    """A forward on meta: what it was given, its weights by path, the calls that gave tensors, and its result."""

    given: Tensor
    weights: dict[str, Tensor]
    calls: list[tuple[Any, tuple[Any, ...], Any]]
    result: Any


def _recorded(module: nn.Module) -> _Recorded | None:
    """`module` run on meta at the width of its first weight, in float32; None if it does not run alone."""
    weights: dict[str, Tensor] = {
        name: nn.Parameter(torch.empty_like(tensor, device="meta", dtype=torch.float32), requires_grad=False)
        for name, tensor in module.named_parameters()
    }
    first = next(iter(weights.values()), None)
    if first is None or first.dim() != 2:
        return None
    given, calls = torch.empty(ROWS, first.shape[1], device="meta"), _Calls()
    try:
        with torch.no_grad(), calls:
            result = torch.func.functional_call(module, weights, (given,))
    except Exception:  # whatever it needs, it is nothing that a product of its input could be
        return None
    return _Recorded(given, weights, calls.seen, result)


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


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
