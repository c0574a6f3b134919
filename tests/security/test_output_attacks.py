"""Other files of an output: a manifest that leads elsewhere, a model.onnx that does, names that become source text."""

import ast
import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from tiny import rewritten

import fxquant
from fxquant import CompileOptions, FxquantError
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engine_readers.folder import WeightFolder
from fxquant.engines.table import Target
from fxquant.lowering.ascend.deployment import deployment
from fxquant.lowering.ascend.emitter.emit import ascend_code
from fxquant.lowering.onnx.required import require_emitted
from fxquant.lowering.output_folder.manifest import MANIFEST, Manifest, read_manifest
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.program.program_file import dump_program, load_program, parse_program
from fxquant.verification.weight_checks import check_stored

DIGEST = "0" * 32
GOOD: dict[str, Any] = {
    "fxquant": "0.1.0", "kernels": 1, "source": "../in", "checkpoint": "../in", "policy": "float", "target": "ascend",
    "tp": 1, "ep": 1, "graph_only": False, "foreign": False,
    "sources": {"model.safetensors": {"header": DIGEST, "size": 8}}, "files": {"config.json": 3},
    "digests": {"optional/x": DIGEST}, "weights": {"w.safetensors": DIGEST},
    "units": {"lm_head": {"key": DIGEST, "digests": {"weight": DIGEST}}},
}  # fmt: skip
ELSEWHERE = ["../x", "/dev/zero", "/etc/passwd", "a/../../x", "", ".", "a//b", "a/", "./a", "a\0b"]
ELSEWHERE += ["x" * 5000, "x" * 256, "a/" * 1024 + "b"]
WRONG: list[Any] = [None, True, "1", -1, 0.5, [], {}, [[]], 10**30]


def read(document: Any, folder: Path) -> Manifest:
    (folder / MANIFEST).write_text(json.dumps(document))
    return read_manifest(folder)


def test_a_manifest_is_read(tmp_path: Path) -> None:
    assert read(GOOD, tmp_path).model_dump() == GOOD


@pytest.mark.parametrize("key", ["sources", "files", "digests", "weights"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_file_name_stays_in_its_folder(key: str, name: str, tmp_path: Path) -> None:
    value = next(iter(GOOD[key].values()))
    with pytest.raises(FxquantError, match="cannot be read"):
        read(GOOD | {key: {name: value}}, tmp_path)


@pytest.mark.parametrize("key", GOOD)
def test_a_field_of_a_manifest_is_what_it_must_be(key: str, tmp_path: Path) -> None:
    refused = 0
    for value in WRONG:
        try:
            manifest = read(GOOD | {key: value}, tmp_path)
        except FxquantError:
            refused += 1
        else:
            assert manifest.model_dump()[key] == value
    assert refused >= len(WRONG) - 2
    with pytest.raises(FxquantError):
        read({field: GOOD[field] for field in GOOD if field != key} | {"tp": None}, tmp_path)


@pytest.mark.parametrize("text", ["null", "[]", "3", "[" * 100_000, '{"a": NaN}', '"\\ud800"', '{"tp": 1, "tp": 2}'])
def test_another_document_is_no_manifest(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(FxquantError):
        read_manifest(tmp_path)


# model.onnx


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Path:
    """The tiny model for ONNX."""
    out = tmp_path_factory.mktemp("attacks") / "out"
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=out, verify=False, target=Target.ONNX)
    return fxquant.compile(tiny_folder(), options).out


def outside(model: onnx.ModelProto) -> None:
    """Weights of a file elsewhere."""
    entry = next(tensor for tensor in model.graph.initializer if tensor.external_data).external_data[0]
    entry.value = "../../secret"


def operator_of_a_library(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "evil"


def huge(model: onnx.ModelProto) -> None:
    model.graph.initializer.add(name="huge", data_type=1, dims=[1 << 40])


def another_function(model: onnx.ModelProto) -> None:
    model.functions[0].node[0].op_type = "Loop"


@pytest.mark.parametrize("attack", [outside, operator_of_a_library, huge, another_function, None])
def test_no_session_is_made_of_another_model(
    attack: Callable[[onnx.ModelProto], None] | None, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(compiled, tmp_path / "out"))
    model = onnx.load(out / "model.onnx", load_external_data=False)
    if attack is not None:
        attack(model)
    (out / "model.onnx").write_bytes(model.SerializeToString() if attack else b"\xff" * 100)
    (out / MANIFEST).unlink()
    sessions: list[Any] = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **_: sessions.append(args))
    program, files = load_program(out / "fxquant_graph.json"), WeightFiles(out)
    with pytest.raises(FxquantError, match="not what the graph emits|not an ONNX model"):
        require_emitted(program, files.infos, out)
    from fxquant.generation.generator import TextGenerator
    from fxquant.generation.options import GenerateOptions

    with pytest.raises(FxquantError, match="not what the graph emits|not an ONNX model"):
        _ = TextGenerator(out, program, files.read, GenerateOptions()).runner
    assert not sessions


def test_a_graph_of_other_weights_is_not_run(compiled: Path) -> None:
    program, files = load_program(compiled / "fxquant_graph.json"), WeightFiles(compiled)
    check_stored(program, files)
    name = next(iter(program.float_names()))
    del files.tensors[name]
    with pytest.raises(FxquantError, match="missing, the graph says"):
        check_stored(program, files)


# names that become source text


def calls(text: str) -> list[str]:
    """What a module calls: functions by name, methods by theirs."""
    called = (node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return sorted(function.attr if isinstance(function, ast.Attribute) else ast.dump(function) for function in called)


NAMES = [
    "torch", "F", "w", "dtype", "json", "Path", "Any", "range", "float", "list", "__builtins__", "__import__", "exec",
    "print", "self", "past", "x", "residual", "cos", "_", "__", "BLOCKS", "Model", "load_table", "register", "layers_0",
]  # fmt: skip


def test_names_of_nodes_are_variables_and_no_more(tiny: Callable[..., Checkpoint]) -> None:
    """Whatever a graph file calls its nodes, blocks and modules, the emitted module calls the same things."""
    document = json.loads(dump_program(rewritten(tiny(), "deepseek_w4a8")))
    expected = calls(ascend_code(deployment(parse_program(json.dumps(document), "graph")).program))
    text, renamed = json.dumps(document), copy.deepcopy(document)
    nodes = [node["name"] for node in renamed["nodes"] if node["op"] == "call_function"]
    for old, new in zip(nodes[1:], NAMES, strict=False):
        text = text.replace(f'"{old}"', f'"{new}"')
    emitted = ascend_code(deployment(parse_program(text, "graph")).program)
    compile(emitted, "model_ascend.py", "exec")
    assert calls(emitted) == expected


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff", b'{"weight_map": []}', None])
def test_a_reader_refuses_what_is_no_description(content: bytes | None, tmp_path: Path) -> None:
    """None: a pipe, which would wait for ever."""
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "description.json").write_text("{}")
    WeightFolder(tmp_path, "description.json")
    place = tmp_path / ("x.safetensors.index.json" if content and b"weight_map" in content else "description.json")
    place.unlink(missing_ok=True)
    os.mkfifo(place) if content is None else place.write_bytes(content)
    with pytest.raises(FxquantError):
        WeightFolder(tmp_path, "description.json")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, None])
def test_a_reader_refuses_what_is_no_weight_file(content: bytes | None, tmp_path: Path) -> None:
    for name in ("config.json", "description.json"):
        (tmp_path / name).write_text("{}")
    place = tmp_path / "x.safetensors"
    os.mkfifo(place) if content is None else place.write_bytes(content)
    with pytest.raises(FxquantError):
        WeightFolder(tmp_path, "description.json")
