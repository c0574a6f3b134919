"""Model file build: a model.py → the float program, in this process."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fxquant.checkpoint.checkpoint import Checkpoint, open_config
from fxquant.checkpoint.config import DeepseekV3Config, parse_config
from fxquant.errors import FxquantError
from fxquant.frontend.adapt import adapted
from fxquant.frontend.families import FAMILIES, family_of
from fxquant.frontend.gate_bias import check_biases
from fxquant.frontend.proof.prove import CopyError, prove
from fxquant.frontend.recognition.published import nonnegative_bias
from fxquant.frontend.traced import Traced
from fxquant.frontend.user_file import UserFile, open_user_file
from fxquant.frontend.user_module import remedy, where
from fxquant.models import DeepseekV3
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program
from fxquant.tracing import trace
from fxquant.tracing.inputs import declared_inputs

CANONICAL = ("input_ids", "attention_mask", "position_ids", "past")


@dataclass(frozen=True)
class Built:
    """The float program, the model's family, what was compared on copies of it ("": none was run), and the classes made
    of published ones that ran their own forward."""

    program: Program
    family: str
    proof: str
    own_classes: str


def trace_file(path: Path, checkpoint: Path | None = None) -> Traced:
    """Import `path`, open the checkpoint it names or `checkpoint`, and trace its model."""
    with open_user_file(path) as file:
        opened = open_config(checkpoint or checkpoint_folder(file))
        built = build_program(file, opened)
    own = f", own forward: {built.own_classes}" if built.own_classes else ""
    checked = f", compared: {built.proof}" if built.proof else ", not checked"
    input_kind = f"model.py, {built.family}{own}{checked}"
    return Traced(dump_program(built.program), opened.folder, file.policy, input_kind)


def checkpoint_folder(file: UserFile) -> Path:
    """The checkpoint folder that the file names, relative to the file, or the one that the file lies in."""
    if file.checkpoint is None:
        if (file.path.parent / "config.json").is_file():
            return file.path.parent
        raise FxquantError(file.path, "names no CHECKPOINT.", "Set CHECKPOINT in the file or pass --checkpoint DIR.")
    folder = file.path.parent / file.checkpoint
    if not folder.is_dir():
        fact = f"CHECKPOINT {file.checkpoint!r} is not a folder."
        raise FxquantError(file.path, fact, "Its path is relative to the file.")
    return folder


def build_program(file: UserFile, checkpoint: Checkpoint) -> Built:
    """Build on meta, check a small copy, adapt and trace. Raises FxquantError for any mistake in the file."""
    config = parse_config(checkpoint.config, checkpoint.folder / "config.json")
    model = build_model(file, config, "meta")
    family = family_of(model)
    proof, failed = "", None
    try:
        proof = prove(file, config, lambda small, device: build_model(file, small, device))
    except CopyError as error:
        failed = error
    program, own = _traced(file, model, config, checkpoint)  # outside of `except`: it looks at exceptions in flight
    if failed is not None:
        fact = "a copy of it with hidden_size 64 and other small sizes fails where it does not: "
        fact += f"{failed.place}: {failed.fact}"
        raise FxquantError(file.path, fact, "Take every size from the config that build_model is given.") from failed
    check_biases(program, checkpoint, nonnegative_bias(model))
    return Built(program, family.name if family else "fxquant", proof, own)


def _traced(file: UserFile, model: nn.Module, config: DeepseekV3Config, checkpoint: Checkpoint) -> tuple[Program, str]:
    """The float program of the whole model, and the names of its own classes."""
    with adapted(model, config, file.leaves) as root:
        own = ", ".join(vars(root).get("own_classes", ()))
        inputs = file.example_inputs and declared_inputs(root, file.example_inputs, file.dynamic_shapes)
        return trace(root, checkpoint, inputs, file.checkpoint_names), own


def build_model(file: UserFile, config: DeepseekV3Config, device: str) -> nn.Module:
    """The file's model on `device`, in inference mode; raises FxquantError if it is not a DeepSeek-V3."""
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            model = file.build(config)
    except FxquantError:
        raise
    except Exception as error:
        raise FxquantError(file.path, f"build_model failed: {where(error, file.path)}", remedy(error)) from error
    if not isinstance(model, nn.Module):
        fact = f"build_model returned a {type(model).__name__}."
        raise FxquantError(file.path, fact, "Return a torch.nn.Module.")
    _check_root(file, model)
    family = family_of(model)
    if family is not None:
        family.prepare(model, config)
    return model.eval()


def _check_root(file: UserFile, model: nn.Module) -> None:
    if isinstance(model, DeepseekV3) or family_of(model) is not None:
        return
    parameters = tuple(inspect.signature(model.forward).parameters)
    if parameters != CANONICAL:
        known = ", ".join(dict.fromkeys(family.root or "Transformer" for family in FAMILIES))
        taken = ", ".join(parameters) or "nothing"
        fact = f"build_model returned a {type(model).__name__}, whose forward takes {taken}."
        way_out = f"Return a DeepSeek-V3: fxquant.models.DeepseekV3, {known}, or a module whose forward takes "
        raise FxquantError(file.path, fact, way_out + ", ".join(CANONICAL) + ".")
