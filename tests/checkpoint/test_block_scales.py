"""FP8 block scales in every dtype that checkpoints have: the same values, the same outputs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measured import Measured
from output_folders import files_of
from safetensors.torch import load_file, save_file
from tiny import write_checkpoint
from torch import Tensor

from fxquant import CompileOptions, compile, plan
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.errors import FxquantError
from fxquant.lowering.output_folder.manifest import LEDGER, MANIFEST, STAMPS

FORMS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
OF_THE_SOURCE = (LEDGER, MANIFEST, STAMPS)
"""Files of an output that count the source's bytes."""
POLICY = "deepseek_w4a8_dynamic"
NAME = "model.layers.0.self_attn.o_proj.weight"


def folder_with(path: Path, form: torch.dtype) -> Path:
    """An FP8 checkpoint whose scales are powers of two, stored as `form`."""
    folder = write_checkpoint(path / str(form), fp8=True)
    rewrite(folder, lambda scale: (2.0 ** scale.log2().round()).to(form))
    return folder


def rewrite(folder: Path, change: Callable[[Tensor], Tensor], names: str = "_scale_inv") -> None:
    """Change the tensors whose names end in `names`."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: change(tensor) if name.endswith(names) else tensor for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    return {form: folder_with(tmp_path_factory.mktemp("scales"), form) for form in FORMS}


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_every_form_reads_as_float32_does(form: torch.dtype, folders: dict[torch.dtype, Path]) -> None:
    expected, other = open_checkpoint(folders[torch.float32]), open_checkpoint(folders[form])
    assert other.scales[NAME].dtype is form and other.nbytes < expected.nbytes
    for name in expected.tensors:
        assert torch.equal(other.read(name), expected.read(name))


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.float16, marks=pytest.mark.slow),
        torch.float8_e8m0fnu,
    ],
    ids=str,
)
def test_every_form_gives_the_same_bytes(
    form: torch.dtype, folders: dict[torch.dtype, Path], tmp_path: Path, reference: dict[str, bytes]
) -> None:
    """Verified against the slow reference, too."""
    result = compile(folders[form], CompileOptions(policy=POLICY, out=tmp_path / "out", export=False))
    assert result is not None
    assert files_of(tmp_path / "out", OF_THE_SOURCE) == reference


@pytest.fixture(scope="module")
def reference(folders: dict[torch.dtype, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("reference") / "out"
    compile(folders[torch.float32], CompileOptions(policy=POLICY, out=out, export=False, verify=False))
    return files_of(out, OF_THE_SOURCE)


def test_a_plan_counts_the_bytes_of_small_scales(folders: dict[torch.dtype, Path]) -> None:
    sizes = [open_checkpoint(folders[form]).scales[NAME].nbytes for form in FORMS]
    assert sizes == [8, 4, 4, 2]
    plan(folders[torch.float8_e8m0fnu], CompileOptions(policy=POLICY), measuring=Measured())


def test_every_e8m0_code_is_its_power_of_two() -> None:
    codes = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu).float().double()
    assert torch.equal(codes, 2.0 ** (torch.arange(255, dtype=torch.float64) - 127))


def test_a_scale_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, torch.float8_e8m0fnu)
    rewrite(folder, lambda scale: torch.full_like(scale.view(torch.uint8), 255).view(scale.dtype), f"{NAME}_scale_inv")
    with pytest.raises(FxquantError, match=NAME):
        compile(folder, CompileOptions(policy=POLICY, out=tmp_path / "out", export=False, verify=False))
    assert not (tmp_path / "out").exists()
