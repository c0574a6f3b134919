"""What counts as the same code, and what does not."""

from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from fxquant.frontend.recognition.published import read, version_of
from fxquant.frontend.user_file import module_of, open_user_file

PLAIN = """
import functools

import torch
from torch import nn
from torch.nn import functional as F

window = 64


def scale(x, by):
    return x * by


class Part(nn.Module):
    def forward(self, x):
        y = F.silu(x)
        return scale(y, window) + self.own(x)

    def own(self, x):
        return x
"""
SAME = {
    "names of locals": ("y = F.silu(x)\n        return scale(y,", "given = F.silu(x)\n        return scale(given,"),
    "comments": ("y = F.silu(x)", "y = F.silu(x)  # the gate"),
    "docstrings": ("def own(self, x):", 'def own(self, x):\n        """As it is."""'),
    "annotations": ("def forward(self, x):", "def forward(self, x: torch.Tensor) -> torch.Tensor:"),
    "the class's name": ("class Part", "class Other"),
    "another name for a package": ("from torch.nn import functional as F", "import torch.nn.functional as F"),
    "layout": (
        "return scale(y, window) + self.own(x)",
        "return (\n            scale(y, window)\n            + self.own(x)\n        )",
    ),
}
OTHER = {
    "a number": ("return x * by", "return x * by * 2"),
    "a function that it calls": ("return x * by", "return by * x"),
    "a method that it calls": ("def own(self, x):\n        return x", "def own(self, x):\n        return -x"),
    "another function of torch": ("F.silu", "F.gelu"),
    "two locals swapped": ("scale(y, window)", "scale(x, window)"),
    "a callable by the name of a function of torch": (
        "class Part(nn.Module):\n    def forward(self, x):\n        y = F.silu(x)",
        "class Own:\n    def __call__(self, x):\n        return -x\n\n\nsilu = Own()\n\n\n"
        "class Part(nn.Module):\n    def forward(self, x):\n        y = silu(x)",
    ),
    "an attribute": ("self.own(x)", "self.mine(x)"),
    "a default": ("def scale(x, by):", "def scale(x, by=1):"),
    "a decorator of its own": (
        "class Part(nn.Module):\n    def forward",
        "def no_grad(function):\n    @functools.wraps(function)\n    def own(*args):\n"
        "        return -function(*args)\n\n    return own\n\n\n"
        "class Part(nn.Module):\n    @no_grad\n    def forward",
    ),
    "one statement more": ("y = F.silu(x)", "y = F.silu(x)\n        y = y.clamp(max=7)"),
}  # fmt: skip


def part(folder: Path, text: str) -> type[nn.Module]:
    (folder / "model.py").write_text(text + "\n\nmodel = nn.Linear(1, 1)\n")
    with open_user_file(folder / "model.py") as file:
        module: ModuleType = module_of(file)
        cls = getattr(module, "Part", None) or module.Other
        read(cls)  # while its file can be read
        return cls


@pytest.mark.parametrize(("here", "there"), SAME.values(), ids=SAME.keys())
def test_the_same_code(here: str, there: str, tmp_path: Path) -> None:
    assert here in PLAIN
    plain, changed = read(part(tmp_path, PLAIN)), read(part(tmp_path, PLAIN.replace(here, there)))
    assert plain and changed and plain.digest == changed.digest


@pytest.mark.parametrize(("here", "there"), OTHER.values(), ids=OTHER.keys())
def test_other_code(here: str, there: str, tmp_path: Path) -> None:
    assert here in PLAIN
    plain, changed = read(part(tmp_path, PLAIN)), read(part(tmp_path, PLAIN.replace(here, there)))
    assert plain and changed and plain.digest != changed.digest


def test_values_of_global_names_are_told(tmp_path: Path) -> None:
    code = read(part(tmp_path, PLAIN))
    assert code and code.constants == {"window": 64}


def test_words_of_a_decorator_that_changes_nothing_are_no_values(tmp_path: Path) -> None:
    """As transformers documents its forwards."""
    documented = "@torch.no_grad()\n    @torch.inference_mode(bool(window))\n    def forward"
    code = read(part(tmp_path, PLAIN.replace("def forward", documented).replace("(y, window)", "(y, 2)")))
    assert code and code.constants == {}


def test_what_is_attached_to_an_instance_makes_it_another_class() -> None:
    hf = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")

    def norm() -> nn.Module:
        return hf.DeepseekV3RMSNorm(8)

    assert version_of(norm(), "transformers") is not None
    changed = [norm() for _ in range(5)]
    changed[0].register_forward_hook(lambda *_: None)
    changed[1].register_forward_pre_hook(lambda *_: None)
    changed[2].forward = lambda x: x
    nn.utils.parametrize.register_parametrization(changed[3], "weight", nn.Identity())
    changed[4].__class__ = type("Called", (hf.DeepseekV3RMSNorm,), {"__call__": lambda self, x: x})
    assert [version_of(each, "transformers") for each in changed] == [None] * 5
