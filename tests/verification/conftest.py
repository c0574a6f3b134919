"""Fixtures: folders as the reference quantizer publishes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_folders import POLICIES, SHAPE, publish
from safetensors.torch import save_file

import fxquant
from fxquant import CompileOptions
from fxquant.engines.table import Target

Fixture = Callable[..., Path]


@pytest.fixture(scope="session")
def plain(tiny_folder: Fixture) -> Path:
    """A small model."""
    return tiny_folder(**SHAPE)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Fixture:
    """`published("groups", Target.ASCEND)`: that policy's output for that target, published."""
    place = tmp_path_factory.mktemp("published")
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, place / "ids.safetensors")
    made: dict[str, Path] = {}

    def get(policy: str = "groups", target: Target = Target.ASCEND, model: Path = plain) -> Path:
        key = f"{policy}-{target}-{model.name}"
        if key not in made:
            text = POLICIES[policy]
            name = text
            if "\n" in text:
                name = str(place / f"{policy}.yaml")
                Path(name).write_text(text)
            out = place / f"compiled-{key}"
            options = CompileOptions(
                policy=name, target=target, out=out, calib=place / "ids.safetensors", verify=False, export=False
            )
            fxquant.compile(model, options)
            made[key] = publish(out, place / key)
        return made[key]

    return get
