"""Verify, for folders that others wrote: layout, description, every tensor against the source, the engine's reading."""

from collections.abc import Mapping
from pathlib import Path

import torch

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import parse_config
from fxquant.checkpoint.model_parallel_parts import HeldTensor, SourceTensor
from fxquant.engines.contract import load_contract
from fxquant.engines.documents import group_size
from fxquant.engines.engine import Engine
from fxquant.engines.rank_layout import checked_layout
from fxquant.engines.serving import RankLayout
from fxquant.engines.table import DEFAULT, ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.foreign.found import CONFIG, FoundFolder, find_folder
from fxquant.foreign.model import source_of_found
from fxquant.foreign.program import FoundProgram, found_program
from fxquant.frontend.source import Source
from fxquant.lowering.output_folder.copies import copied_files
from fxquant.lowering.output_folder.layout import StoredTensor, stored_tensors
from fxquant.passes.check_contract import linears
from fxquant.program.program import Program
from fxquant.progress import Reporter
from fxquant.runtime.weight_providers import Cached
from fxquant.verification.blocks import block_names, one_of_each_kind, walk
from fxquant.verification.contract_checks import check_contract, takes_dtype, unverified
from fxquant.verification.engine_check import EngineChecker
from fxquant.verification.foreign_documents import (
    check_config,
    check_entries,
    check_form,
    check_header,
    check_layout,
    check_mtp,
    sections,
)
from fxquant.verification.foreign_rotation import check_rotation, rotation
from fxquant.verification.foreign_weights import compare_foreign, formulas_alone
from fxquant.verification.report import Check, VerifyReport
from fxquant.verification.run import (
    SAMPLE_ABOVE,
    SAMPLED_EXPERTS,
    SAMPLED_TENSORS,
    VALUE_CACHE,
)
from fxquant.verification.weight_checks import sample


def verify_foreign(
    folder: Path,
    source: Source | None,
    full: bool,
    report: Reporter,
    tp: int | None = None,
    target: Target | None = None,
    ep: int | None = None,
) -> VerifyReport:
    """Check `folder`, as `target` reads it, against `source` (None: its own config.json says what the model is).

    Nothing is believed but the bytes: what types, scales and shapes say must hold of one another. Raises FxquantError
    if there is nothing to check: no weights, no description, no config.json here and no source.
    """
    found = find_folder(folder, ENGINES[target or DEFAULT].description)
    result = found_program(found, source or source_of_found(found))
    target = target or infer_target(found, result)
    engine = ENGINES[target]
    checkpoint = None if source is None else source.checkpoint
    named = None if checkpoint is None else str(checkpoint.folder)
    layout = check_layout(found, engine, target)
    if result.program is None:
        types = Check("types of modules", 1, 1, list(dict.fromkeys(result.faults)))
        unread = {"weights": "not compared: the types of modules contradict each other"}
        checks = [layout, check_entries(found, []), check_header(found, result, engine), types]
        return VerifyReport(checks=checks, source=named, unread=unread)
    program = result.in_form_of(engine)
    stored = stored_tensors(program, _believed(found, program, checkpoint))
    sampled = not full and sum(tensor.nbytes for tensor in stored) > SAMPLE_ABOVE
    documents = [layout, check_entries(found, stored), check_header(found, result, engine), check_form(result, target)]
    own = parse_config(source.checkpoint.config, source.path) if source is not None else None
    documents += [check_config(found, program, engine, own), check_mtp(found, program)]
    names = check_shapes(found, stored)
    ranks = checked_layout(load_contract(target), linears(program), tp, ep)
    contract = check_contract(program, target, ranks)
    checks = [*documents, names, contract]
    unread = _unread(found, program, engine, target, checkpoint)
    wrong, uncompared = wrong_modules(found, stored), dict[str, str]()
    if checkpoint is None:
        checks.append(formulas_alone(found, program, wrong))
    elif rotation(found):
        uncompared["weights"] = "not compared with the source: rotated, says the description"
        checks.append(check_rotation(found, program.config["hidden_size"]))
        checks.append(formulas_alone(found, program, wrong))
    else:
        intact = [tensor for tensor in stored if tensor.module not in wrong]
        units = sample(intact, SAMPLED_TENSORS if sampled else None)
        values, uncompared = compare_foreign(found, checkpoint, program, result.original, units, report)
        checks += values
    if names.ok and all(check.ok for check in (documents[1], documents[3])):
        checks += _read_as_engine(found, program, engine, target, ranks, sampled, report)
    else:
        unread["engine's reading"] = "not emulated: the tensors are not those that it looks for"
    return VerifyReport(
        checks=checks,
        source=named,
        sampled=sampled,
        partial=bool(uncompared),
        unread=unread | uncompared,
    )


def infer_target(found: FoundFolder, result: FoundProgram) -> Target:
    """The target that such a folder is for: by format, description, keys of config.json, names of weight files."""
    files = {info.file.name for info in found.infos.values()}

    def fit(target: Target) -> tuple[int, ...]:
        engine = ENGINES[target]
        keys = {} if result.program is None else engine.config(result.program)
        return (
            engine.open_reader is not None,
            result.read_by(engine),
            engine.description == found.description,
            -sum((found.config or {}).get(key) != value for key, value in keys.items()),
            all(name.startswith((f"{engine.stem}-", f"{engine.stem}.")) for name in files),
            target is DEFAULT,
        )

    return max(Target, key=fit)


def check_shapes(found: FoundFolder, stored: list[StoredTensor]) -> Check:
    """Every tensor that the graph needs, in its shape; and no other."""
    check = Check("tensors: name, dtype, shape", len(stored))
    expected = {tensor.name: tensor.spec for tensor in stored}
    for name, spec in expected.items():
        info = found.infos.get(name)
        held = "missing" if info is None else f"{_word(info.dtype)}{list(info.shape)}"
        same = info is not None and info.dtype is spec.dtype and info.shape == spec.shape
        check.expect(same, f"{name}: {held}, its type makes it {_word(spec.dtype)}{list(spec.shape)}")
    check.misses += (f"{name}: no engine reads it" for name in sorted(set(found.infos) - set(expected)))
    return check


def wrong_modules(found: FoundFolder, stored: list[StoredTensor]) -> set[str]:
    """Modules with a tensor that is missing, or not in its dtype and shape."""
    infos = found.infos
    return {
        tensor.module
        for tensor in stored
        if tensor.name not in infos
        or (infos[tensor.name].dtype, infos[tensor.name].shape) != (tensor.spec.dtype, tensor.spec.shape)
    }


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _believed(found: FoundFolder, program: Program, source: Checkpoint | None) -> Checkpoint:
    """Float tensors as they are stored; missing ones as in the source, or as the graph has them."""
    tensors: dict[str, SourceTensor] = {}
    for target, parameter in program.parameters.items():
        shape = tuple(program.graph.tensor(target).shape)[1 if parameter.stacked else 0 :]
        held = torch.empty(shape, dtype=program.dtype, device="meta")
        tensors |= {name: HeldTensor(name, held) for name in parameter.names}
    tensors |= {} if source is None else source.tensors
    meta: Mapping[str, SourceTensor] = {
        name: HeldTensor(name, torch.empty(0, device="meta")) for name in program.mtp.float_tensors
    }
    return Checkpoint(found.path, program.config, {**meta, **tensors, **found.infos})


def _read_as_engine(
    found: FoundFolder,
    program: Program,
    engine: Engine,
    target: Target,
    ranks: RankLayout,
    sampled: bool,
    report: Reporter,
) -> list[Check]:
    """The engine's emulation on the folder, against the graph on the same bytes, block by block."""
    if not takes_dtype(program, target):
        return []
    check = Check(f"{target} opens it", 1)
    try:
        reader = engine.read(found.path, ranks, group_size(program))
    except FxquantError as error:
        check.expect(False, str(error))
        return [check]
    if reader is None:
        return []
    checker = EngineChecker(program, reader, unverified(program, target, ranks), SAMPLED_EXPERTS if sampled else None)
    selected = set(one_of_each_kind(program) if sampled else block_names(program))
    with report("verify reader", len(selected), "blocks") as advance:
        for block, values in walk(program, Cached(found.read, VALUE_CACHE), selected):
            checker.check(block, values)
            advance(1)
    return checker.checks


def _unread(
    found: FoundFolder, program: Program, engine: Engine, target: Target, source: Checkpoint | None
) -> dict[str, str]:
    """What no check has looked at."""
    unread: dict[str, str] = {}
    static = sum(linear.recipe.scheme.static for linear in linears(program))
    if static:
        text = f"ranges of {static} static linears: no text says what their inputs were"
        unread["input_scale, input_offset"] = text
    if program.mtp.recipes:
        unread["multi-token prediction layers"] = "whether the engine reads them: no graph runs them"
    if not engine.reads_sections and found.config is not None:
        odd = list(sections(found.config, program))
        unread |= {CONFIG: f"{'; '.join(odd)}. {target} takes types from the description"} if odd else {}
    for name in list(found.descriptions)[1:]:
        unread[name] = f"all of it: {target} reads {found.description}"
    unread |= _copies(found.path, source)
    read = {info.file.name for info in found.infos.values()} | {index.name for index in found.indexes}
    read |= {CONFIG, found.description}
    compared = set(copied_files(source)) if source is not None else set()
    others = (path.relative_to(found.path).as_posix() for path in sorted(found.path.rglob("*")) if path.is_file())
    return unread | {name: "all of it" for name in others if name not in read | set(unread) | compared}


def _copies(folder: Path, source: Checkpoint | None) -> dict[str, str]:
    """Tokenizer files and the like, where they are not those of the source."""
    odd = {}
    for name, file in (copied_files(source) if source is not None else {}).items():
        copy = folder / name
        if not copy.is_file():
            odd[name] = "missing, the source has it"
        elif copy.read_bytes() != file.read_bytes():
            odd[name] = "differs from the source's"
    return odd
