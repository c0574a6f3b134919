"""Traces of a model with and without stamping, to compare."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config
from torch import Tensor, nn

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config, parse_config
from fxquant.errors import FxquantError
from fxquant.models import DecoderLayer, DeepseekV3
from fxquant.models.deepseek_v3 import Decoder
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program
from fxquant.program.schema import SYMBOLS
from fxquant.tracing import export as trace_module
from fxquant.tracing import trace
from fxquant.tracing.inputs import Inputs

LAYERS = 6
Build = Callable[[DeepseekV3Config], DeepseekV3]


def checkpoint_of(**changes: Any) -> Checkpoint:
    """Six layers, one of them dense; no weights are written."""
    return Checkpoint(Path("tiny"), tiny_config(**{"num_hidden_layers": LAYERS, **changes}), {})


class Traces:
    """Traces a model with and without stamping.

    depths   numbers of layers that torch.export saw
    reasons  why layers were not stamped
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.depths: list[int] = []
        self.reasons: list[str] = []
        self._monkeypatch, self._export = monkeypatch, trace_module._exported
        self._from_representatives = trace_module._from_representatives
        monkeypatch.setattr(trace_module, "_exported", self._counted)
        monkeypatch.setattr(trace_module, "_from_representatives", self._reasoned)

    def both(self, build: Build, checkpoint: Checkpoint | None = None) -> tuple[Program | str, Program | str]:
        """A program each way, or the error's text."""
        checkpoint = checkpoint or checkpoint_of()
        with torch.device("meta"):
            model = build(parse_config(checkpoint.config, "tiny"))
        members = list(model.model.layers)
        stamped = _result(model, checkpoint)
        assert list(model.model.layers) == members
        with self._monkeypatch.context() as patch:
            patch.setattr(trace_module, "_exported", self._export)
            patch.setattr(trace_module, "_stamped", lambda *_: None)
            return stamped, _result(model, checkpoint)

    def _counted(self, model: nn.Module, inputs: Inputs) -> Any:
        self.depths.append(len(inputs.runs[0][3]))
        return self._export(model, inputs)

    def _reasoned(self, *arguments: Any) -> Any:
        try:
            return self._from_representatives(*arguments)
        except Exception as error:
            self.reasons.append(str(error))
            raise


def _result(model: DeepseekV3, checkpoint: Checkpoint) -> Program | str:
    try:
        return trace(model, checkpoint)
    except FxquantError as error:
        return str(error)


def same(left: Program | str, right: Program | str) -> bool:
    """Whether two programs are written alike and their nodes carry the same shapes, or two errors are alike."""
    if isinstance(left, str) or isinstance(right, str):
        return left == right
    texts = [(str(program.graph.graph), program.names, program.parameters) for program in (left, right)]
    if texts[0] != texts[1]:
        return False
    return dump_program(left) == dump_program(right) and shapes(left) == shapes(right)


def shapes(program: Program) -> list[Any]:
    """What each node is, with numbers for dynamic sizes; names of symbols depend on the number of inputs."""
    nodes = program.graph.graph.find_nodes(op="placeholder")
    ids, mask, past = (nodes[index].meta["val"].shape for index in (0, 1, 3))
    symbols = {str(ids[0]): "batch", str(ids[1]): "sequence", str(mask[1]): "total", str(past[1]): "past"}

    def number(size: Any) -> int:
        if isinstance(size, int):
            return size
        return int(
            size.node.expr.subs({symbol: SYMBOLS[symbols[str(symbol)]] for symbol in size.node.expr.free_symbols})
        )

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, tuple(map(number, value.shape)), tuple(map(number, value.stride()))
        if isinstance(value, list | tuple):
            return [described(item) for item in value]
        return number(value) if isinstance(value, torch.SymInt | int) else str(value)

    return [described(node.meta.get("val")) for node in program.graph.graph.nodes]


class Indexed(DecoderLayer):
    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        self.index = index


class NoCacheInLast(Decoder):
    """It has one layer fewer than caches."""

    def __init__(self, config: DeepseekV3Config, layer: type[DecoderLayer]) -> None:
        super().__init__(config, layer)
        del self.layers[-1]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        return super().forward(input_ids, attention_mask, position_ids, past[: len(self.layers)])


def of(layer: type[DecoderLayer]) -> Build:
    return lambda config: DeepseekV3(config, layer)


def decoder(decoder: type[Decoder], layer: type[DecoderLayer] = DecoderLayer) -> Build:
    """A model whose decoder's forward is that of `decoder`."""

    def build(config: DeepseekV3Config) -> DeepseekV3:
        model = DeepseekV3(config)
        model.model = decoder(config, layer)
        return model

    return build
