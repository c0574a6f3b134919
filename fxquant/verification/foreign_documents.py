"""Documents of a folder that others wrote: names, index, description, config.json, against its tensors and source."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxquant.checkpoint.config import DeepseekV3Config, parse_config
from fxquant.engines.documents import FORMAT_VERSION, scheme_keys
from fxquant.engines.engine import Engine
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.foreign.found import CONFIG, FoundFolder
from fxquant.foreign.model import model_config
from fxquant.foreign.program import FoundProgram
from fxquant.inputs.json_file import read_json
from fxquant.inputs.limits import INDEX_BYTES
from fxquant.lowering.output_folder.layout import StoredTensor
from fxquant.passes.check_contract import linears
from fxquant.policy.kinds import Kind
from fxquant.program.program import Program
from fxquant.schemes.schemes import Scheme
from fxquant.schemes.weight_formats import WeightFormat
from fxquant.verification.report import Check

SECTIONS = {Kind.ATTENTION: "mla_quantize", Kind.ROUTED_EXPERT: "moe_quantize"}
TYPES = (*SECTIONS.values(), "mtp_quantize", "quantize")
CACHE_KEYS = ("kv_cache_type", "kv_quant_type", "fa_quant_type", "reduce_quant_type")


def check_layout(found: FoundFolder, engine: Engine, target: Target) -> Check:
    """Files under the names that the engine looks for, every tensor once, and where the index says."""
    files = sorted({info.file.name for info in found.infos.values()})
    check = Check("files and index", len(files) + len(found.infos))
    other = f"the description is {found.description}, {target} reads {engine.description}"
    check.expect(found.description == engine.description, other)
    check.expect(found.config is not None, f"{CONFIG}: missing; the engine starts from it")
    check.expect(len(files) == 1 or found.indexes, f"{len(files)} weight files, but no index of them")
    check.checked = len(files) + len(found.infos)
    check.misses += (f"{name}: in {one} and in {two}" for name, (one, two) in sorted(found.twice.items()))
    for index in found.indexes:
        check.misses += _of_index(index, found)
    return check


def _of_index(index: Path, found: FoundFolder) -> Iterator[str]:
    try:
        document = read_json(index, INDEX_BYTES)
    except FxquantError as error:
        yield f"{index.name}: {error.fact}"
        return
    listed = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(listed, dict):
        yield f"{index.name}: it has no weight_map"
        return
    for name in sorted({*listed, *found.infos}):
        said, held = listed.get(name), found.infos[name].file.name if name in found.infos else None
        if said is None:
            yield f"{index.name}: {name} is missing, {held} has it"
        elif said != held:
            yield f"{index.name}: {name} in {said!s:.80}, {f'it is in {held}' if held else 'no file has it'}"


def check_entries(found: FoundFolder, stored: list[StoredTensor]) -> Check:
    """One entry for each tensor, with the type that its module has, and none without a tensor."""
    types, described = found.types, found.description
    check = Check("description: an entry for each tensor", len(found.infos))
    check.checked = len(found.infos)
    expected = {tensor.name: tensor.spec.description for tensor in stored}
    for name in sorted({*types, *found.infos}):
        if name not in types:
            check.misses.append(f"{described}: no entry for {name}")
        elif name not in found.infos:
            check.misses.append(f"{described}: {name} is {types[name]:.40}, but no file has it")
        elif types[name] != expected.get(name, types[name]):
            check.misses.append(f"{described}: {name} is {types[name]:.40}, its module makes it {expected[name]}")
    return check


def check_header(found: FoundFolder, program: FoundProgram, engine: Engine) -> Check:
    """The keys by which engines know the format, against the tensors."""
    check = Check("description: header", 3 + len(CACHE_KEYS))
    header, place = found.header, found.description
    size, first = max(program.sizes.items(), default=(0, ""))
    said = header.get("group_size")
    int4 = program.program is not None and any(recipe.int4 for recipe in program.program.recipes.values())
    needed = "group_size" in header or (int4 and "group_size" in _keys(engine, program.program, "header"))
    right = type(said) is int and said == size
    fact = f"the second scales of {first} have groups of {size}" if size else "there are no second scales"
    check.expect(right or not needed, f"{place}: group_size {_shown(said)}, {fact}")
    version = header.get("version")
    packed = any(form.packed for form in program.forms) and "version" in _keys(engine, program.program, "header")
    wrong = f"{place}: version {_shown(version)}, packed int4 is {FORMAT_VERSION}"
    check.expect(not packed or version == FORMAT_VERSION, wrong)
    _check_quant_type(check, header, program.program, place)
    for key in CACHE_KEYS:
        fact = f"{place}: {key} {_shown(header.get(key))}; fxquant knows no quantized cache or all-reduce"
        check.expect(not header.get(key), fact)
    return check


def _check_quant_type(check: Check, header: dict[str, Any], program: Program | None, place: str) -> None:
    """One of the types that modules have: tools differ in which, and engines take it where a tensor has no entry."""
    if program is None:
        return
    types = {recipe.scheme.value for recipe in (program.recipes | program.mtp.recipes).values()} or {Scheme.FLOAT.value}
    said = header.get("model_quant_type")
    listed = ", ".join(sorted(types))
    check.expect(said in types, f"{place}: model_quant_type {_shown(said)}, the types of modules are {listed}")


def check_form(program: FoundProgram, target: Target) -> Check:
    """The tensors are of the format that the engine reads."""
    check = Check(f"format of {target}", 1)
    size = max(program.sizes, default=0)
    form = ENGINES[target].weight_format(size)
    names = " or ".join(sorted(each for each, e in ENGINES.items() if e.weight_format(size) in program.forms))
    found = _words(min(program.forms)) if program.forms else "of no one format"
    check.expect(form in program.forms, f"{found}, the form of {names or 'no target'}; {target} reads {_words(form)}")
    return check


def _words(form: WeightFormat) -> str:
    if not form.packed:
        return "int4 unpacked, one to a byte, without scale_bias"
    if form.model_dtype_scales:
        return "int4 packed and per channel, static linears without weight_scale"
    return "int4 packed, two to a byte, with scale_bias, static linears with weight_scale"


def check_config(found: FoundFolder, program: Program, engine: Engine, source: DeepseekV3Config | None) -> Check:
    """config.json: the model's sizes as in the source, the engine's own keys, and one type for each section."""
    check = Check("config.json", 0)
    config = found.config
    if config is None:
        return check
    check.misses += _model_keys(found, source) if source is not None else ()
    for key, value in engine.config(program).items():
        if key not in TYPES:
            check.expect(
                config.get(key) == value, f"{key}: {_shown(config.get(key))}, the engine needs {_shown(value)}"
            )
    left = config.get("quantization_config")
    if "quantization_config" not in engine.config(program):
        check.expect(not left, f"quantization_config {_shown(left)} is left from the source: the weights are not that")
    if engine.reads_sections:
        check.misses += sections(config, program)
    check.total = check.checked = len(config)
    return check


def sections(config: dict[str, Any], program: Program) -> Iterator[str]:
    """Types by section that contradict the tensors, or sections whose linears are not of one type."""
    kinds: dict[str, dict[str, str]] = {}
    for linear in linears(program):
        key = SECTIONS.get(linear.section)
        if key is not None and linear.recipe.scheme is not Scheme.FLOAT:
            kinds.setdefault(key, {}).setdefault(linear.recipe.scheme.value, linear.recipe.module)
    expected = scheme_keys(program)
    for key, schemes in kinds.items():
        if len(schemes) > 1:
            yield f"{key}: one type a section, but " + ", ".join(f"{m} is {s}" for s, m in schemes.items())
    for key in TYPES:
        said = config.get(key)
        if key in expected and said is None and key == "moe_quantize":
            yield f"{key}: missing, the tensors are {expected[key]}"
        elif key in expected and said is not None and str(said).lower() not in _aliases(expected[key]):
            yield f"{key}: {_shown(said)}, the tensors are {expected[key]}"


def _aliases(scheme: str) -> tuple[str, ...]:
    """Names of a type in config.json; prefill and decode apart has two."""
    return (scheme, "w8a8_pdmix") if scheme == Scheme.W8A8_MIX.lower() else (scheme,)


def _model_keys(found: FoundFolder, source: DeepseekV3Config) -> Iterator[str]:
    assert found.config is not None
    try:
        own = parse_config(model_config(found.config), found.path / CONFIG)
    except FxquantError as error:
        yield str(error.fact)
        return
    for key, value in source.model_dump().items():
        theirs = own.model_dump()[key]
        if theirs != value and key != "num_nextn_predict_layers":
            yield f"{key}: {_shown(theirs)}, the source has {_shown(value)}"


def check_mtp(found: FoundFolder, program: Program) -> Check:
    """config.json announces as many multi-token prediction layers as there are."""
    check = Check("multi-token prediction layers", 1)
    said, held = (found.config or {}).get("num_nextn_predict_layers", 0) or 0, len(program.mtp.layers)
    there = "are stored" if held != 1 else "is stored"
    check.expect(found.config is None or said == held, f"{CONFIG}: num_nextn_predict_layers {said}, {held} {there}")
    return check


def _keys(engine: Engine, program: Program | None, which: str) -> dict[str, Any]:
    return {} if program is None else getattr(engine, which)(program)


def _shown(value: object) -> str:
    return "is missing" if value is None else f"{value!r:.100}"
