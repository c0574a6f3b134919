"""The matrix of a rotated residual stream lies where the reference tool puts it, and engines look for it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxquant.api import compile, plan, verify
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.compilation.options import CompileOptions
from fxquant.lowering.output_folder.rotation_file import FILE, ROWS, TENSOR, rotation_rows

EMBEDDING = "model.embed_tokens.weight"


def compiled(source: Path, folder: Path, rotate: str) -> Path:
    folder.mkdir()
    policy = folder / "policy.yaml"
    policy.write_text(f"extends: deepseek_w4a8_dynamic\nrotate: [{rotate}]")
    return compile(source, CompileOptions(policy=str(policy), out=folder / "out", export=False, verify=False)).out


@pytest.fixture(scope="module")
def source(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder()


@pytest.fixture(scope="module")
def out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(source, tmp_path_factory.mktemp("rotated") / "x", "hidden, heads")


def global_rotation(out: Path) -> torch.Tensor:
    """As vllm-ascend 0.23.0 finds it."""
    described = json.loads((out / "quant_model_description.json").read_text())
    return load_file(out / described["optional"]["quarot"]["rotation_map"]["global_rotation"])["global_rotation"]


def test_it_is_the_matrix_of_the_embedding(source: Path, out: Path) -> None:
    """A row of E Q is 256 products, summed in some order, then rounded to bfloat16, as the stored row is."""
    q, before = global_rotation(out), open_checkpoint(source).read(EMBEDDING).float()
    (weights,) = out.glob("*.safetensors")
    after = load_file(weights)[EMBEDDING].float()
    size = before.abs().sum(1, keepdim=True) / len(q) ** 0.5
    assert ((before @ q - after).abs() <= 2.0**-8 * after.abs() + 2.0**-20 * size).all()
    assert torch.allclose(q @ q.T, torch.eye(len(q)), atol=2.0**-18)  # 256 terms of 1 / 256, each rounded
    back = ((after @ q.T) - before).abs().max()
    assert back <= 2.0**-8 * after.abs().sum(1).max() / len(q) ** 0.5


def test_rows_are_those_of_one_matrix() -> None:
    size = 2 * ROWS
    whole = torch.cat(list(rotation_rows(size)))
    assert whole.shape == (size, size) and set(whole.abs().unique().tolist()) == {float(whole[0, 0].abs())}
    assert list(rotation_rows(0)) == []


def test_without_a_rotated_stream_there_is_none(source: Path, tmp_path: Path) -> None:
    other = compiled(source, tmp_path / "heads", "heads")
    assert not (other / FILE).exists()
    assert "optional" not in json.loads((other / "quant_model_description.json").read_text())


def test_the_plan_knows_its_size(source: Path, out: Path) -> None:
    sizes = plan(source, CompileOptions(policy=str(out.parent / "policy.yaml"))).documents
    assert sizes[FILE] == (out / FILE).stat().st_size
    assert sizes["quant_model_description.json"] == (out / "quant_model_description.json").stat().st_size


def test_another_matrix_is_found_without_a_manifest(source: Path, out: Path, tmp_path: Path) -> None:
    assert verify(out, source).verdict == "verified"
    matrix = global_rotation(out)
    (out / "fxquant_manifest.json").rename(tmp_path / "manifest")
    save_file({TENSOR: -matrix}, out / FILE)
    misses = [miss for check in verify(out, source).checks for miss in check.misses]
    assert misses == [f"{FILE}: missing, or another matrix"]
