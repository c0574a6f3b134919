"""What only a copy of all layers shows: an adapter that loses something in one of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fxquant.checkpoint.checkpoint import open_config
from fxquant.checkpoint.config import parse_config
from fxquant.errors import FxquantError
from fxquant.frontend.build import build_model, trace_file
from fxquant.frontend.proof.copies import numbers, tokens
from fxquant.frontend.proof.layers import _real
from fxquant.frontend.proof.prove import prove
from fxquant.frontend.user_file import open_user_file

MODEL = """
from fxquant.models import DecoderLayer, DeepseekV3

class Other(DecoderLayer):
    window = 50

    def __init__(self, config, index):
        super().__init__(config, index)
        self.index = index

    def forward(self, x, *rest):
        y, present = super().forward(x, *rest)
        return (y * 1.01 if self.index == 2 else y), present

def plain(own, adaptation):
    made = DecoderLayer.__new__(DecoderLayer)
    vars(made).update(vars(own))
    return made

LEAVES = {leaves}

def build_model(config):
    return DeepseekV3(config, layer=Other)
"""


@pytest.mark.slow
def test_the_first_layer_that_differs_is_named(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder(num_hidden_layers=4)
    (tmp_path / "model.py").write_text(MODEL.format(leaves="{Other: plain}"))
    with pytest.raises(FxquantError, match=r"layer 2 \(Other\).*narrow copy of 59 tokens.*by 0\.0099"):
        trace_file(tmp_path / "model.py", folder)
    (tmp_path / "model.py").write_text(MODEL.format(leaves="{}"))
    assert trace_file(tmp_path / "model.py", folder).input_kind.endswith("4 of 4 layers, 59 tokens, 3 steps")


def test_lengths_are_the_numbers_of_own_classes() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.window, self.far = 33, 100000
            self.inner = torch.nn.Linear(4096, 3, device="meta")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)[:, :77]

    assert numbers(Own()) == {33, 77, 3}


LIMIT = 130


def reached(x: torch.Tensor) -> torch.Tensor:
    return x[: 13 * 11]


def test_lengths_are_also_in_globals_and_functions_that_are_reached() -> None:
    class Own(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return reached(x) if x.shape[0] > LIMIT else x

    assert {130, 143} <= numbers(Own())


def test_padding_comes_before_a_rows_tokens() -> None:
    given = tokens(64, (5, 2), 3)
    assert given.ids.shape == (2, 8)
    assert _real(given).tolist() == [[True] * 8, [False] * 3 + [True] * 5]


UNUSUAL = """
from torch import nn
from fxquant.models import DeepseekV3

class Stack(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.inner = config, DeepseekV3(config)

    def forward(self, input_ids, attention_mask, position_ids, past):
        return self.inner(input_ids, attention_mask, position_ids, past)

def checkpoint_names(name):
    return name.removeprefix("inner.")

def build_model({parameter}):
    {config}
    return Stack(config)
"""


@pytest.mark.slow
def test_layers_are_found_wherever_a_model_keeps_them(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    (tmp_path / "model.py").write_text(UNUSUAL.format(parameter="config", config="pass"))
    assert "2 of 2 layers" in trace_file(tmp_path / "model.py", tiny_folder()).input_kind


def test_a_large_model_of_ours_that_ignores_config_is_not_checked_and_says_so(
    tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    size = "from fxquant.checkpoint.config import parse_config; import json; config = parse_config("
    size += f"json.load(open({str(tiny_folder() / 'config.json')!r})) | dict(vocab_size=700000), 'here')"
    (tmp_path / "model.py").write_text(UNUSUAL.format(parameter="", config=size))
    with open_user_file(tmp_path / "model.py") as file:
        config = parse_config(open_config(tiny_folder()).config, "tiny")
        assert prove(file, config, lambda small, device: build_model(file, small, device)) == ""
