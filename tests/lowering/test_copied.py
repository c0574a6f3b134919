"""Everything that is copied is checked while it is copied: damage is made again, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from output_folders import files_of, same_files
from safetensors.torch import save_file
from tiny import write_checkpoint

from fxquant import CompileOptions, FxquantError, compile
from fxquant.api import convert
from fxquant.calibration.calibration_file import CALIBRATION
from fxquant.engines.table import Target
from fxquant.lowering.finish import Places
from fxquant.lowering.output_folder.manifest import FLOAT_GRAPH, GRAPH, LEDGER, MANIFEST, read_manifest
from fxquant.storage.safetensors import header_bytes, read_header

POLICY = "deepseek_w4a8"
EXPERT, KEPT = "model.layers.0.mlp.experts.0.gate_proj", "model.norm.weight"
TENSORS = {
    "codes": f"{EXPERT}.weight",
    "scales": f"{EXPERT}.weight_scale",
    "second scales": f"{EXPERT}.weight_scale_second",
    "kept": KEPT,
    "static": "model.layers.0.self_attn.o_proj.deq_scale",
}
DOCUMENTS = [GRAPH, FLOAT_GRAPH, LEDGER, CALIBRATION, "tokenizer_config.json", "chat_template.jinja"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("copied")
    shape = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_hidden_layers": 1}
    model = write_checkpoint(base / "model", **shape)
    (model / "tokenizer_config.json").write_text('{"a": 1}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    save_file({"ids": torch.arange(48).view(2, 24)}, base / "ids.safetensors")
    return model


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    """The output of one go, undamaged. Do not write to it."""
    return compiled(model, model.parent / "whole")


def compiled(model: Path, out: Path, **options: object) -> Path:
    compile(model, options_for(model, out, **options))
    return out


def options_for(model: Path, out: Path, **options: object) -> CompileOptions:
    given = {"calib": model.parent / "ids.safetensors", "verify": False, "export": False, **options}
    return CompileOptions(policy=POLICY, out=out, **given)  # type: ignore[arg-type]


def flip(file: Path, place: int) -> None:
    """One bit of the byte at `place`; a negative one counts from the end."""
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def flip_tensor(folder: Path, name: str) -> Path:
    """One bit in the middle of a tensor; the file it lies in."""
    (file,) = (file for file in folder.glob("*.safetensors") if name in read_header(file))
    info = read_header(file)[name]
    flip(file, (info.start + info.end) // 2)
    return file


def copy_of(whole: Path, folder: Path) -> Path:
    """Beside no source: what the manifest names as such is not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(whole, folder))


# convert


def refused(folder: Path, into: Path, *words: str, verify: bool = False) -> None:
    with pytest.raises(FxquantError) as caught:
        convert(folder, Target.MINDIE, into, verify=verify)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "compile again with --force" in caught.value.remedy
    assert not [path.name for path in into.parent.iterdir() if path.name.startswith(into.name)]


@pytest.mark.parametrize("what", TENSORS)
@pytest.mark.parametrize("verify", [True, False])
def test_convert_refuses_a_damaged_tensor_by_name(what: str, verify: bool, whole: Path, tmp_path: Path) -> None:
    """Without a source, so that nothing else could tell."""
    folder = copy_of(whole, tmp_path / "a" / "b" / "old")
    file = flip_tensor(folder, TENSORS[what])
    refused(folder, tmp_path / "new", file.name, TENSORS[what], "not as it was written", verify=verify)


@pytest.mark.parametrize("target", [Target.ONNX, Target.MINDIE])
def test_convert_of_one_form_and_of_another_checks_kept_tensors(target: Target, whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "old")
    flip_tensor(folder, KEPT)
    with pytest.raises(FxquantError, match=f"tensor {KEPT} is not as it was written"):
        convert(folder, target, tmp_path / "new", verify=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_convert_refuses_a_damaged_document_by_name(name: str, whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "old")
    flip(folder / name, -3)
    refused(folder, tmp_path / "new", name, "not as it was written")


@pytest.mark.parametrize("name", [*DOCUMENTS, "quant_model_weight_w4a8.safetensors"])
def test_convert_refuses_a_missing_file_by_name(name: str, whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "old")
    (folder / name if (folder / name).exists() else next(folder.glob("quant_model_weight*"))).unlink()
    refused(folder, tmp_path / "new", "is missing, but the manifest lists it")


def test_convert_refuses_a_damaged_header(whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "old")
    file = next(folder.glob("quant_model_weight*.safetensors"))
    file.write_bytes(file.read_bytes().replace(b'"format":"pt"', b'"format":"tp"'))
    refused(folder, tmp_path / "new", file.name, "not as it was written")


def test_convert_refuses_a_tensor_that_the_manifest_does_not_know(whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "old")
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["units"][EXPERT]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    refused(folder, tmp_path / "new", f"has no hash of {EXPERT}")


def test_convert_of_a_document_that_changes_while_it_is_copied(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(whole, tmp_path / "old")
    monkeypatch.setattr("fxquant.lowering.convert.check_documents", read_manifest)
    flip(folder / "chat_template.jinja", -3)
    refused(folder, tmp_path / "new", "chat_template.jinja", "not as it was written")


# --force and --reuse


DAMAGE: dict[str, Callable[[Path], object]] = {
    **{f"tensor: {what}": lambda out, name=name: flip_tensor(out, name) for what, name in TENSORS.items()},
    "all of a file": lambda out: [zeroed(file) for file in out.glob("quant_model_weight*.safetensors")],
    "header": lambda out: [flip(file, 100) for file in out.glob("quant_model_weight*.safetensors")],
    "cut off": lambda out: [cut(file) for file in out.glob("quant_model_weight*.safetensors")],
    "missing": lambda out: [file.unlink() for file in out.glob("quant_model_weight*.safetensors")],
    "calibration": lambda out: flip(out / CALIBRATION, -3),
    "no calibration": lambda out: (out / CALIBRATION).unlink(),
    "documents": lambda out: [flip(out / name, -3) for name in (GRAPH, FLOAT_GRAPH, LEDGER)],
    "stamps": lambda out: (out / "fxquant_stamps.json").write_text("[" * 5000),
}


def zeroed(file: Path) -> None:
    start = len(header_bytes(file))
    data = bytearray(file.read_bytes())
    data[start:] = bytes(len(data) - start)
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize("verify", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_force_makes_what_is_damaged_anew(damage: str, verify: bool, model: Path, whole: Path, tmp_path: Path) -> None:
    out = copy_of(whole, tmp_path / "out")
    DAMAGE[damage](out)
    report = compile(model, options_for(model, out, force=True, verify=verify))
    assert same_files(out, whole) and [path.name for path in tmp_path.iterdir()] == ["out"]
    work = report.output.work
    assert (work.remade > 0) == (damage.startswith("tensor") or damage == "all of a file")
    if work.remade:
        assert len(report.notes) == 1 and "and made again from the source" in report.notes[0]
    if damage.startswith("tensor"):
        assert work.reused > work.remade and TENSORS[damage.removeprefix("tensor: ")].startswith(
            report.notes[0].rpartition(": ")[2]
        )
    if damage in ("header", "cut off", "missing"):
        assert "were made again" in report.notes[0]


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in ("header", "cut off", "missing")])
@pytest.mark.parametrize("size", [None, pytest.param(50_000, marks=pytest.mark.slow)])
def test_reuse_makes_what_is_damaged_anew(
    damage: str, size: int | None, model: Path, whole: Path, tmp_path: Path
) -> None:
    """Copied as whole files, and tensor by tensor into other files."""
    old = copy_of(whole, tmp_path / "old")
    DAMAGE[damage](old)
    before = files_of(old)
    sizes = {} if size is None else {"max_shard_size": size}
    fresh = whole if size is None else compiled(model, tmp_path / "fresh", **sizes)
    report = compile(model, options_for(model, tmp_path / "out", reuse=old, **sizes))
    assert same_files(tmp_path / "out", fresh) and files_of(old) == before
    assert (report.output.work.remade > 0) == (damage.startswith("tensor") or damage == "all of a file")


def test_killed_while_reusing_what_is_damaged_does_not_get_through(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = copy_of(whole, tmp_path / "old")
    flip_tensor(old, TENSORS["codes"])
    options = options_for(model, tmp_path / "out", reuse=old)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fxquant.lowering.weights.work.FillJob", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        compile(model, options)
    assert Places(tmp_path / "out").journal.is_file()
    compile(model, options)
    assert same_files(tmp_path / "out", whole)


def test_a_calibration_that_is_damaged_in_unfinished_work_is_not_gone_on_with(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fxquant.lowering.output._write_manifest", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        compiled(model, out)
    flip(Places(out).files / CALIBRATION, -3)
    assert same_files(compiled(model, out), whole)
