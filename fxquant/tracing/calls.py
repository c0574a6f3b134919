"""Call log: the functions and arguments that a forward calls, so that runs and layers can be compared."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

SCALARS = (bool, int, float, complex, str, type, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class Made:
    """Tensor `index` of the result of call number `call`."""

    call: int
    index: int


@dataclass(frozen=True, slots=True)
class Given:
    """Flat input `index` of the model."""

    index: int


@dataclass(frozen=True, slots=True)
class Held:
    """The parameter or buffer at `path`."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Unknown:
    """A tensor that no call made, or an argument that is not a plain value: equal only to itself."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a torch function while `module` runs; `results` are shapes and dtypes of the tensors it returned."""

    function: Any
    module: str
    arguments: Any
    results: tuple[Any, ...]


@dataclass
class Log:
    """One run of a model: its calls, where its tensors come from, and which calls each layer made.

    spans   (layer path, its first call, the call after its last), in the order in which layers ended
    """

    calls: list[Call] = field(default_factory=list)
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    @property
    def functions(self) -> list[Any]:
        return [call.function for call in self.calls]


def first_difference(one: Log, other: Log) -> str | None:
    """The module that makes the first call of another function, or with other numbers with a fraction, which sizes are
    not; None if there is none."""
    before = ""
    for call, another in zip(one.calls, other.calls, strict=False):
        if call.function != another.function or _fractions(call.arguments) != _fractions(another.arguments):
            within = _innermost_of_both(call.module, another.module)
            return within if within in (call.module, another.module) else before
        before = call.module
    return None if len(one.calls) == len(other.calls) else before


def _innermost_of_both(one: str, other: str) -> str:
    """The path of the innermost module that has both."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return ".".join(name for name, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _fractions(plain: Any) -> list[Any]:
    """The floats among recorded arguments."""
    if not isinstance(plain, tuple):
        return []
    return [plain] if plain[:1] == (float,) else [each for item in plain for each in _fractions(item)]


class Recorder(TorchFunctionMode):
    """Runs a model and records a log; the members of its outermost module lists are its layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._layers = model, set(layer_paths(model))
        self.failed_in: str | None = None
        """Path of the innermost module that ran when the last run failed."""
        self._paths = {id(module): path for path, module in model.named_modules()}
        # reversed: of the paths of a shared tensor, the first one stays
        self._held = {id(tensor): _held(path, tensor) for path, tensor in reversed(model_state(model).items())}

    def record(self, arguments: tuple[Any, ...]) -> Log:
        """Run once on `arguments`."""
        self.failed_in = None
        self._log, self._stack, self._alive = Log(), [""], list(tensors(arguments))
        self._starts: list[int] = []
        self._made: dict[int, Any] = dict(self._held)
        self._made |= {id(tensor): Given(index) for index, tensor in enumerate(self._alive)}
        hooks = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        )
        try:
            with self:
                outputs = self._model(*arguments)
        finally:
            for hook in hooks:
                hook.remove()
        self._log.outputs = [self._made.get(id(tensor), Unknown()) for tensor in tensors(outputs)]
        self._alive.clear()
        return self._log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` and record it."""
        kwargs = kwargs or {}
        stand_in = next((argument for argument in args if _stands_for_tensors(argument)), None)
        if stand_in is not None:
            with self:  # what it calls is recorded
                return type(stand_in).__torch_function__(func, types, args, kwargs)
        arguments = (self._plain(args), self._plain(kwargs))
        result = func(*args, **kwargs)
        outputs = list(tensors(result))
        for index, tensor in enumerate(outputs):  # setdefault: an in-place call returns a tensor that is known already
            self._made.setdefault(id(tensor), Made(len(self._log.calls), index))
        self._alive += outputs  # an id must not be reused for another tensor before the run ends
        results = tuple((tuple(tensor.shape), tensor.dtype) for tensor in outputs)
        self._log.calls.append(Call(func, self._stack[-1], arguments, results))
        return result

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._stack.append(self._paths.get(id(module), self._stack[-1]))
        self._starts.append(len(self._log.calls))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        running = self._stack.pop()
        if self.failed_in is None and sys.exc_info()[0] is not None:
            self.failed_in = running
        start, path = self._starts.pop(), self._paths.get(id(module))
        if path in self._layers:
            self._log.spans.append((path, start, len(self._log.calls)))

    def _plain(self, value: Any) -> Any:
        """An argument as a comparable, hashable value: tensors by their origin, numbers with their type."""
        if isinstance(value, Tensor):
            return self._made.get(id(value)) or self._strange(value)
        if isinstance(value, list | tuple):
            return (list if isinstance(value, list) else tuple, *map(self._plain, value))
        if isinstance(value, dict):
            return (dict, *((key, self._plain(item)) for key, item in value.items()))
        if isinstance(value, slice):
            return (slice, *map(self._plain, (value.start, value.stop, value.step)))
        if value is None or value is ...:
            return value
        return (type(value), repr(value)) if isinstance(value, SCALARS) else Unknown()

    def _strange(self, tensor: Tensor) -> Unknown:
        self._alive.append(tensor)
        self._made[id(tensor)] = Unknown()
        return self._made[id(tensor)]


def _stands_for_tensors(value: Any) -> bool:
    return not isinstance(value, Tensor) and hasattr(type(value), "__torch_function__")


def _held(path: str, tensor: Tensor) -> Held:
    return Held(path, tuple(tensor.shape), tensor.dtype)


def outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The module lists that are not inside another one, in order."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {path: lists[path] for path in lists if not any(path.startswith(other + ".") for other in lists)}


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of the repeated layers: the members of every outermost module list, in order."""
    return [f"{path}.{index}" for path, layers in outermost_lists(model).items() for index in range(len(layers))]


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its paths, in the order in which torch.export lists them."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of nested lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
