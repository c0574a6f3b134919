"""Loops over experts in models of no family: one grouped call where an expert is a SwiGLU, whatever its code."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import FxquantError
from fxquant.frontend.build import trace_file
from fxquant.frontend.own.plain_experts import swiglu_weights
from fxquant.program.program_file import parse_program

FILE = """
import torch
from torch import nn
from fxquant.models import DeepseekV3
from fxquant.models.layers import Gate

class Expert(nn.Module):
    def __init__(this, config):
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        this.gate_proj, this.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        this.down_proj = nn.Linear(inner, width, bias=False)

    def forward(this, x):
        up = this.up_proj(x)
        return this.down_proj({activated})

class Mixture(nn.Module):
    def __init__(this, config, published):
        super().__init__()
        this.gate, this.shared_experts = published.gate, published.shared_experts
        this.experts = nn.ModuleList(Expert(config) for _ in range(config.n_routed_experts))

    def forward(this, x):
        tokens = x.flatten(0, -2)
        chosen, weights = this.gate(tokens)
        y = torch.zeros_like(tokens)
        {loop}
        return y.view_as(x) + this.shared_experts(x)

def build_model(config):
    model = DeepseekV3(config)
    for layer in model.model.layers[config.first_k_dense_replace:]:
        layer.mlp = Mixture(config, layer.mlp)
    return model
"""
PLAIN = "nn.functional.silu(this.gate_proj(x)) * up"
WHERE = """for number in range(len(this.experts)):
            row, place = torch.where(chosen == number)
            y[row] += this.experts[number](tokens[row]) * weights[row, place, None]"""
NONZERO = """for number in chosen.unique().tolist():
            row, place = (chosen == number).nonzero(as_tuple=True)
            y[row] = y[row] + this.experts[number](tokens[row]) * weights[row, place, None]"""
INDEX_ADD = """for number, expert in enumerate(this.experts):
            row, place = torch.where(chosen == number)
            if row.numel():
                y.index_add_(0, row, expert(tokens[row]) * weights[row, place, None])"""


@pytest.mark.parametrize("loop", [WHERE, NONZERO, INDEX_ADD])
def test_a_loop_becomes_one_call(loop: str, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    (tmp_path / "model.py").write_text(FILE.format(activated=PLAIN, loop=loop))
    program = parse_program(trace_file(tmp_path / "model.py", tiny_folder()).program, "here")
    calls = [node for node in program.graph.graph.nodes if "moe_experts" in str(node.target)]
    sparse = sum(
        layer >= program.config["first_k_dense_replace"] for layer in range(program.config["num_hidden_layers"])
    )
    assert len(calls) == sparse


def test_experts_that_compute_something_else_are_refused(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    (tmp_path / "model.py").write_text(FILE.format(activated=f"({PLAIN}).clamp(max=60)", loop=NONZERO))
    with pytest.raises(
        FxquantError, match="Mixture cannot be traced: the size of what aten::_unique2 gives depends on"
    ):
        trace_file(tmp_path / "model.py", tiny_folder())


class Expert(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 4, bias), nn.Linear(8, 4, bias), nn.Linear(4, 8, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(x) * torch.nn.functional.silu(self.a(x)))


def test_weights_are_found_by_what_they_do() -> None:
    assert swiglu_weights(Expert()) == {"gate_proj": "a.weight", "up_proj": "b.weight", "down_proj": "c.weight"}
    hooked = Expert()
    hooked.a.register_forward_hook(lambda module, given, result: result * 2)
    assert swiglu_weights(hooked) is None and swiglu_weights(Expert(bias=True)) is None
    assert swiglu_weights(nn.Linear(8, 8)) is None and swiglu_weights(nn.SiLU()) is None
