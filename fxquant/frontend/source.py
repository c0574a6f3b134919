"""Model source: MODEL, a checkpoint folder or a model.py → a float program and its checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxquant.checkpoint.checkpoint import Checkpoint, block_size, open_checkpoint, open_config
from fxquant.checkpoint.config import DeepseekV3Config, parse_config, read_config_file
from fxquant.checkpoint.config_notes import config_notes
from fxquant.checkpoint.model_dtype import with_dtype
from fxquant.errors import FxquantError
from fxquant.frontend.child import trace_in_child
from fxquant.frontend.named_checkpoint import named_checkpoint
from fxquant.inputs.paths import not_a_model
from fxquant.models import DeepseekV3
from fxquant.program.program import Program
from fxquant.program.program_file import parse_program
from fxquant.tracing import trace

TRACE_TIMEOUT = 120.0
"""Seconds that a model.py may take to import, build and trace."""


@dataclass(frozen=True)
class Source:
    """A model without weights, the checkpoint that has them, and the policy its file names, if any.

    program     a fresh copy of the float program at each call
    input_kind  the kind of source, as a report shows it
    from_file   a model.py defines its graph; else it is the published one
    """

    path: Path
    checkpoint: Checkpoint
    config: DeepseekV3Config
    program: Callable[[], Program]
    policy: str | None = None
    input_kind: str = "checkpoint folder"
    from_file: bool = False

    @property
    def name(self) -> str:
        """Short name for default output folders."""
        return self.checkpoint.folder.resolve().name

    @property
    def notes(self) -> list[str]:
        """What a user should know about the model's config: `config_notes`."""
        return config_notes(self.checkpoint.config)


def open_source(
    path: Path, checkpoint: Path | None = None, timeout: float = TRACE_TIMEOUT, config_only: bool = False
) -> Source:
    """Open a checkpoint folder or a `model.py`. `checkpoint` overrides the folder that the file names.

    Opening a folder runs no code. A `model.py` is imported, built and traced in a separate process, which is killed
    after `timeout` seconds; only its graph, as text, comes back. A checkpoint that is known before is opened before it.
    `config_only` also accepts a config.json, or a folder
    with nothing else; the checkpoint then has no tensors.
    """
    if config_only and path.suffix == ".json" and path.is_file():
        return _from_config(path, _config_file(path), path)
    wrong = not_a_model(path)
    if wrong is not None:
        raise wrong
    if checkpoint is not None and path.suffix != ".py":
        fact = "applies only to a model.py."
        raise FxquantError(f"--checkpoint {checkpoint}", fact, "Leave it out: a checkpoint folder has its own weights.")
    if path.is_dir():
        return _from_config(path, open_config(path) if config_only else open_checkpoint(path), path / "config.json")
    opening = open_config if config_only else open_checkpoint
    folder = checkpoint or named_checkpoint(path)
    early = _checked(opening, folder) if folder is not None else None  # what would be refused is not traced first
    traced = trace_in_child(path, checkpoint, timeout)
    opened, config = early if early and folder == traced.checkpoint else _checked(opening, traced.checkpoint)
    program = traced.program
    return Source(path, opened, config, lambda: parse_program(program, path), traced.policy, traced.input_kind, True)


def _checked(opening: Callable[[Path], Checkpoint], folder: Path) -> tuple[Checkpoint, DeepseekV3Config]:
    opened = opening(folder)
    return opened, parse_config(opened.config, folder / "config.json")


def source_of_config(config: dict[str, Any], place: Path) -> Source:
    """The model of a config.json that was read from `place`; its checkpoint has no tensors."""
    config = with_dtype(config, (), place)
    return _from_config(place, Checkpoint(place.absolute().parent, config, {}), place)


def _config_file(path: Path) -> Checkpoint:
    config = read_config_file(path)
    return Checkpoint(path.absolute().parent, with_dtype(config, (), path), {}, {}, block_size(path, config))


def _from_config(path: Path, opened: Checkpoint, place: Path) -> Source:
    config = parse_config(opened.config, place)
    input_kind = "checkpoint folder" if opened.tensors else "config.json"
    return Source(path, opened, config, lambda: trace(_on_meta(config), opened), input_kind=input_kind)


def _on_meta(config: DeepseekV3Config) -> DeepseekV3:
    with torch.device("meta"):
        return DeepseekV3(config)
