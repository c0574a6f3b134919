"""Emitted weights: the tensors of a block of `model_ascend.py`, each loaded when a statement reads it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.lowering.ascend.emitted.weight_loading import Stored
from fxquant.lowering.ascend.operators import KERNELS
from fxquant.runtime.large_matrix import WHOLE

Load = Callable[[dict[str, Stored]], dict[str, Tensor]]
"""`load_table` of the emitted module, for some entries of a block."""


class EmittedWeights(Mapping[str, Any]):
    """Name → tensor, as `Model.weights` has it; experts that are large together come one by one."""

    def __init__(self, table: dict[str, Stored], load: Load) -> None:
        self._table, self._load = table, load

    def __getitem__(self, name: str) -> Any:
        stored = self._table[name]
        if not stored.experts:
            return self._load({name: stored})[name]
        stack = ExpertStack(name, stored, self._load)
        return stack if stack.nbytes > WHOLE else self._load({name: stored})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


class ExpertStack:
    """A tensor [experts, ...] of which one expert is in memory, the last one asked for.

    The NPU operators take it as a weight: their references read it expert by expert.
    """

    def __init__(self, name: str, stored: Stored, load: Load) -> None:
        texts = range(stored.experts) if isinstance(stored.experts, int) else stored.experts
        self._name, self._stored, self._load = name, stored, load
        self._experts = [str(text) for text in texts]
        self._last = (0, self._one(0))
        first = self._last[1]
        self.shape, self.dtype = torch.Size((len(self._experts), *first.shape)), first.dtype
        self.nbytes = len(self._experts) * first.nbytes

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, place: Any) -> Tensor:
        """`stack[expert]`, or `stack[expert, …]`."""
        expert, *inner = place if isinstance(place, tuple) else (place,)
        if self._last[0] != expert:
            self._last = (expert, self._one(expert))
        return self._last[1][tuple(inner)]

    def dim(self) -> int:
        """As of a tensor."""
        return len(self.shape)

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return self.dtype.is_floating_point

    def _one(self, expert: int) -> Tensor:
        own = Stored(self._stored.layout, self._stored.names, (self._experts[expert],), self._stored.absolute)
        return self._load({self._name: own})[self._name][0]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return KERNELS[function.__name__.partition(".")[0]](*args, **(kwargs or {}))
