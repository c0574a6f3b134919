"""Check of model.onnx before ONNX Runtime loads it: it must be what the folder's graph emits.

A session follows all paths, operators and sizes in a model; the emitted model names only the folder's weight files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import AccuracyLevel, OnnxProfile
from fxquant.errors import FxquantError
from fxquant.inputs.json_file import read_bytes
from fxquant.inputs.limits import ONNX_BYTES
from fxquant.lowering.onnx.deployment import deployment
from fxquant.lowering.onnx.description import described, stored_provenance
from fxquant.lowering.onnx.writer import ACCURACY_LEVEL, FILE, build_model
from fxquant.program.program import Program
from fxquant.storage.safetensors import TensorInfo

AGAIN = "Compile again; the file is not to be edited."


def require_emitted(program: Program, tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """Raise FxquantError unless `folder/model.onnx` is what `program` emits over `tensors`, those of the folder.

    Only the version of fxquant that wrote it may differ, and what it says it came from. Its metadata say the form.
    """
    form = stored_form(folder)
    require_model(deployment(program, form).program, form, tensors, folder)


def require_model(deployed: Program, form: OnnxForm, tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """As `require_emitted`, for a program that was deployed for `form`."""
    place = folder / FILE
    stored, emitted = read_model(place), onnx.ModelProto()
    model = described(build_model(deployed, tensors, form), stored_provenance(stored))
    emitted.ParseFromString(ir.to_proto(model).SerializeToString())
    stored.producer_version = emitted.producer_version = ""
    if stored != emitted:
        raise FxquantError(place, f"{_difference(stored, emitted)} is not what the graph emits.", AGAIN)


def read_model(place: Path) -> onnx.ModelProto:
    """The model without its weights; no file that it names is opened."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(read_bytes(place, ONNX_BYTES, AGAIN))
    except DecodeError as error:
        raise FxquantError(place, f"not an ONNX model: {error}.", AGAIN) from None
    return model


def stored_form(folder: Path) -> OnnxForm:
    """The form of `folder/model.onnx`, by its metadata. Raises FxquantError for a choice that fxquant does not know."""
    place = folder / FILE
    said = {prop.key: str(prop.value) for prop in read_model(place).metadata_props}
    either = ["true", "false"]
    choices: dict[str, Sequence[str]] = {
        "profile": list(OnnxProfile),
        "cache": list(OnnxCache),
        "last_logits": either,
        "inline": either,
    }
    if said.get("profile") in [profile.value for profile in OnnxProfile if profile.contrib]:
        choices[ACCURACY_LEVEL] = [str(level.value) for level in AccuracyLevel]
    for key, values in choices.items():
        if said.get(key, "") not in values:
            fact = f"its metadata say the {key} {said.get(key, '')[:50]!r}, which fxquant does not know."
            raise FxquantError(place, fact, AGAIN)
    profile, cache = OnnxProfile(said["profile"]), OnnxCache(said["cache"])
    form = OnnxForm(profile, cache, said["last_logits"] == "true", said["inline"] == "true")
    if not profile.contrib:
        return form
    return replace(form, accuracy_level=AccuracyLevel(int(said[ACCURACY_LEVEL])))


def _difference(stored: onnx.ModelProto, emitted: onnx.ModelProto) -> str:
    """Kind and name of the first part of a model that differs."""
    pairs = zip(_parts(stored), _parts(emitted), strict=False)
    other = next((part for (part, here), (_, there) in pairs if here != there), None)
    return "the number of its nodes, or its header," if other is None else other[:200]


def _parts(model: onnx.ModelProto) -> Iterator[tuple[str, object]]:
    graph = model.graph
    groups = (graph.input, graph.output, graph.initializer, graph.node, graph.value_info, model.functions)
    for group in groups:
        for part in group:
            yield f"{type(part).__name__.removesuffix('Proto')} {part.name!r}", part
