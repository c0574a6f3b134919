"""An output folder is data: nothing in it runs as code, whatever its JSON says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import fxquant
from fxquant import CompileOptions, FxquantError

ATTACK = "x\n_ = open({place!r}, 'w')\n#"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Path:
    """A tiny model for the Ascend target."""
    out = tmp_path_factory.mktemp("security") / "out"
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=out, verify=False)
    return fxquant.compile(tiny_folder(), options).out


def spoil(document: dict, where: str, text: str) -> None:
    """Put `text` into one place of a stored graph."""
    node = next(node for node in document["nodes"] if node["op"] == "call_function")
    if where in ("name", "module", "block"):
        node[where] = text
    elif where == "keyword":
        node["kwargs"] = {"map": {text: 1}}
    elif where == "argument":
        node["args"].append(text)
    else:
        parameter = document["parameters"].pop(next(iter(document["parameters"])))
        document["parameters"][text if where == "target" else "a.b"] = parameter
        if where == "tensor name":
            parameter["names"] = [text]


@pytest.mark.parametrize("where", ["name", "module", "block", "keyword", "argument", "target", "tensor name"])
def test_texts_of_a_stored_graph_are_names_or_refused(where: str, compiled: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(compiled, tmp_path / "out"))
    path, place = out / "fxquant_graph.json", tmp_path / "written"
    document = json.loads(path.read_text())
    spoil(document, where, ATTACK.format(place=str(place)))
    path.write_text(json.dumps(document))
    with pytest.raises(FxquantError, match="not a program of fxquant"):
        fxquant.verify(out)
    assert not place.exists()


def test_a_config_cannot_leave_the_docstring(compiled: Path, tmp_path: Path) -> None:
    from fxquant.lowering.ascend.emitter.emit import ascend_code
    from fxquant.program.program_file import load_program

    program = load_program(compiled / "fxquant_graph.json")
    program.config["architectures"] = ['"""\nimport os\n"""\\']
    text = ascend_code(program)
    assert "\nimport os\n???" in text.split('"""')[1]
    compile(text, "model_ascend.py", "exec")


def test_evaluating_runs_no_model_file(compiled: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(compiled, tmp_path / "out"))
    manifest = json.loads((out / "fxquant_manifest.json").read_text())
    (out / "evil.py").write_text("raise SystemExit('this ran')\n")
    manifest["source"] = "evil.py"
    manifest["checkpoint"] = str((compiled / manifest["checkpoint"]).resolve())
    (out / "fxquant_manifest.json").write_text(json.dumps(manifest))
    import torch
    from safetensors.torch import save_file

    save_file({"ids": torch.arange(24).view(2, 12)}, tmp_path / "ids.safetensors")
    assert fxquant.evaluate(out, tmp_path / "ids.safetensors").tokens == 22
