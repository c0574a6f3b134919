"""Compiled folders for the Ascend tests: weights made from recipes, the emitted module, and the graph's own values."""

import ast
import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import float_program
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.lowering.ascend.deployment import deployment
from fxquant.lowering.ascend.writer import write_ascend
from fxquant.models import DecoderLayer
from fxquant.passes import AssignSchemes, Calibrate, CheckCoverage, QuantizeExperts, QuantizeLinear, run_passes
from fxquant.policy.policy import load_policy
from fxquant.program.program import Program
from fxquant.runtime.execute import execute
from fxquant.runtime.weight_providers import Cached, Read, RecipeWeights, load, make_module
from fxquant.verification.ascend_statements import EmittedModule, StatementCheck, check_statements

WEIGHTS = "quant_model_weight_w8a8.safetensors"


@dataclass
class Compiled:
    """A rewritten program, its checkpoint, and the folder it was written to."""

    program: Program
    checkpoint: Checkpoint
    folder: Path

    @property
    def code(self) -> str:
        return (self.folder / "model_ascend.py").read_text()

    def read(self) -> Read:
        """Stored tensors made anew from the checkpoint, whatever the folder holds."""
        return Cached(RecipeWeights(self.program, self.checkpoint))

    @cached_property
    def deployed(self) -> Program:
        """The fused program, whose values the module computes."""
        return deployment(self.program).program

    def module(self) -> EmittedModule:
        return EmittedModule(self.deployed, self.folder)


def rewritten(checkpoint: Checkpoint, policy: str, layer: type[DecoderLayer] = DecoderLayer) -> Program:
    """The checkpoint's program under a policy, calibrated on random ids."""
    program = float_program(checkpoint, layer)
    loaded = load_policy(policy)
    ids = torch.randint(100, (2, 1, 16), generator=torch.Generator().manual_seed(3))
    calibrate = Calibrate(loaded, checkpoint, lambda: list(ids))
    run_passes(program, [AssignSchemes(loaded), calibrate, QuantizeLinear(), QuantizeExperts(), CheckCoverage()])
    return program


def stored_tensors(program: Program, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of the weight file."""
    tensors = {name: checkpoint.read(name) for name in program.float_names()}
    for recipe in program.recipes.values():
        for module in recipe.modules:
            own = make_module(recipe, module, checkpoint.read)
            tensors |= {f"{module}.{suffix}": tensor.contiguous() for suffix, tensor in own.items()}
    return tensors


def compile_folder(
    checkpoint_folder: Path, out: Path, policy: str, layer: type[DecoderLayer] = DecoderLayer
) -> Compiled:
    """Write weights and module into `out`."""
    checkpoint = open_checkpoint(checkpoint_folder)
    program = rewritten(checkpoint, policy, layer)
    out.mkdir(parents=True, exist_ok=True)
    save_file(stored_tensors(program, checkpoint), out / WEIGHTS)
    write_ascend(program, out)
    return Compiled(program, checkpoint, out)


Compile = Callable[..., Compiled]


def compiled_folders(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """`compiled("deepseek_w4a8", q_lora_rank=None)`, made once. Do not write to its folder."""
    folders: dict[tuple, Compiled] = {}

    def get(policy: str, layer: type[DecoderLayer] = DecoderLayer, **options: Any) -> Compiled:
        key = (policy, layer, repr(sorted(options.items(), key=str)))
        if key not in folders:
            folders[key] = compile_folder(tiny_folder(**options), tmp_path_factory.mktemp("ascend"), policy, layer)
        return folders[key]

    return get


def function_text(code: str, name: str) -> str:
    """One function of a module, as it stands there."""
    function = next(node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef) and node.name == name)
    return ast.get_source_segment(code, function) + "\n"


def corrupted(compiled: Compiled, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Compiled:
    """The same folder with changed stored tensors."""
    shutil.copytree(compiled.folder, out, dirs_exist_ok=True)
    tensors = load_file(compiled.folder / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS)
    damaged = Compiled(compiled.program, compiled.checkpoint, out)
    damaged.deployed = compiled.deployed
    return damaged


def padded_inputs(program: Program, past: int = 3, length: int = 5) -> list[Tensor]:
    """Two rows over a random cache; the second is padded by two on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(100, (2, length), generator=generator)
    mask = torch.ones(2, past + length, dtype=torch.int64)
    mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    caches = program.graph.graph.find_nodes(op="placeholder")[3:]
    random = [torch.randn(2, past, int(node.meta["val"].shape[2]), generator=generator) for node in caches]
    return [ids, mask, positions, *random]


def graph_values(compiled: Compiled, inputs: list[Tensor]) -> dict[str, Any]:
    """Node name → value, for every node of the deployed graph."""
    program, read = compiled.deployed, compiled.read()
    values = dict(zip((n.name for n in program.graph.graph.find_nodes(op="placeholder")), inputs, strict=True))
    for node in program.graph.graph.find_nodes(op="get_attr"):
        values[node.name] = load(program, str(node.target), read)
    execute(program, read, [inputs], lambda node, outputs, inputs: values.update({node.name: copy.copy(outputs[0])}))
    return values


def check_all(compiled: Compiled, block: str | None = None) -> list[StatementCheck]:
    """Statement checks of one block or all, on padded inputs over a cache."""
    module, values = compiled.module(), graph_values(compiled, padded_inputs(compiled.program))
    blocks = dict.fromkeys(call.segment.calls[0].meta["block"] for call in module.emitted)
    selected = [block] if block else list(blocks)
    return [check for name in selected for check in check_statements(module, name, module.load(name), values)]


def bad(checks: list[StatementCheck]) -> dict[str, str]:
    """Node → kind of the statements that do not hold."""
    return {check.node: check.kind for check in checks if not check.ok}
