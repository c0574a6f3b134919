"""What docs/extending.md calls an errand: a patch that does it in few files, and works on a copy of the sources."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from patched_tree import EXAMPLE, PATCHES, PatchedTree, apply, copied, patched, touched, write_model

from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.lowering.output_folder.weight_files import WeightFiles

BY_HAND = PATCHES / "weight_only_by_hand.py"
EVALUATION = EXAMPLE / "evaluation.jsonl"
WEIGHT_ONLY = """\
description: One scheme more.
extends: float
rules:
  - {{kind: shared_expert, scheme: W4A16, group_size: {group_size}}}
  - {{path: "*.o_proj", scheme: W4A16, group_size: {group_size}}}
  - {{kind: dense_mlp, scheme: W8A8_DYNAMIC}}
"""
EXPERTS = """\
description: One scheme more.
extends: float
rules: [{kind: routed_expert, scheme: W4A16}]
"""
PERCENTILE = """\
description: One algorithm more.
extends: float
rules:
  - {kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 64, algorithm: percentile}
  - {kind: shared_expert, scheme: W8A8_DYNAMIC, algorithm: percentile}
  - {path: "*.o_proj", scheme: W4A8_DYNAMIC, group_size: 64, algorithm: percentile}
"""
LONG_ROWS = {"hidden_size": 1088, "intermediate_size": 64, "moe_intermediate_size": 64}
"""In rows of more than a thousand weights the percentile is not the largest one."""
RATES = """\
import json, sys
from pathlib import Path
from fxquant.planning.host_benchmark import Measuring
with Measuring(Path(sys.argv[1]), seconds=300) as measuring:
    print(json.dumps(measuring.result(sys.argv[2:]).kernels))
"""


def written(folder: Path, policy: str) -> Path:
    (folder / "policy.yaml").write_text(policy)
    return folder / "policy.yaml"


def compiled(tree: PatchedTree, model: Path, policy: Path, target: str, out: Path) -> Path:
    """OUT, verified."""
    options = ("-p", policy, "--target", target, "-o", out, "--no-export", "--json", "--quiet")
    report = json.loads(tree.fxquant("compile", model, *options))
    assert report["verification"]["verdict"] == "verified"
    return out


def described(out: Path, scheme: str) -> set[str]:
    """Modules whose weight has a scheme, by the description file."""
    tensors = json.loads((out / "quant_model_description.json").read_text())
    weights = (name for name in tensors if name.endswith(".weight") and tensors[name] == scheme)
    return {name.removesuffix(".weight") for name in weights}


def check_scheme(tree: PatchedTree, folder: Path) -> None:
    """W4A16, per group and per channel: both graphs, what engines read of it, run, eval, and the numbers by hand."""
    model = write_model(folder / "model")
    for target, group_size in (("ascend", 64), ("ascend", 0), ("onnx", 64), ("onnx", 0)):
        policy = written(folder, WEIGHT_ONLY.format(group_size=group_size))
        out = compiled(tree, model, policy, target, folder / f"{target}_{group_size}")
        modules = described(out, "W4A16")
        assert {name.rpartition(".")[2] for name in modules} == {"gate_proj", "up_proj", "down_proj", "o_proj"}
        assert not any(name.endswith(("scale_bias", "input_scale")) for name in WeightFiles(out).infos)
        by_hand = json.loads(tree.python(BY_HAND, out))
        assert by_hand.keys() == modules and max(by_hand.values()) <= 1, by_hand
    assert "npu_weight_quant_batchmatmul" in (folder / "ascend_64" / "model_ascend.py").read_text()
    tree.fxquant("run", folder / "onnx_64", "--prompt", "def main(", "--max-new-tokens", 4)
    tree.fxquant("eval", folder / "ascend_64", "--text", EVALUATION, "--samples", 2, "--seq-len", 32)
    refused = tree.fxquant("plan", model, "-p", written(folder, EXPERTS), code=1)
    assert "routed experts do not support W4A16" in " ".join(refused.split())


def check_algorithm(tree: PatchedTree, folder: Path) -> None:
    """A percentile: kernel and slow reference agree, an edited code is found, and `plan` has the kernels' rates."""
    model, policy = write_model(folder / "model", **LONG_ROWS), written(folder, PERCENTILE)
    out = compiled(tree, model, policy, "onnx", folder / "out")
    compiled(tree, model, policy, "ascend", folder / "ascend")
    modules = sorted(described(out, "W8A8_DYNAMIC"))
    source, stored = open_checkpoint(model), WeightFiles(out)
    assert len(modules) > 5
    for module in modules:
        magnitudes = source.read(f"{module}.weight").float().abs().sort(1).values
        place = -(-999 * magnitudes.shape[1] // 1000) - 1
        assert torch.equal(stored.read(f"{module}.weight_scale"), (magnitudes[:, place] / 127).unsqueeze(1)), module
    plan = json.loads(tree.fxquant("plan", model, "-p", policy, "--json"))
    kernels = {name for name in plan["work"] if "percentile" in name}
    assert {name.split(" of ")[0] for name in kernels} == {"int8 percentile", "int4 groups percentile"}
    rates = json.loads(tree.python("-c", RATES, folder, *sorted(kernels)))
    assert all(rates[name] > 0 for name in kernels)
    _edit_a_code(out, f"{modules[0]}.weight")
    failed = tree.fxquant("verify", out, "--against", model, code=1)
    assert f"{modules[0]}.weight: 1 elements differ" in " ".join(failed.split())


def _edit_a_code(out: Path, name: str) -> None:
    info = WeightFiles(out).infos[name]
    with info.file.open("r+b") as file:
        file.seek(info.start)
        (code,) = file.read(1)
        file.seek(info.start)
        file.write(bytes([code ^ 1]))


class Errand(NamedTuple):
    """A patch, the files besides tests and documents that it may touch, and what works afterwards."""

    patch: str
    files: int
    check: Callable[[PatchedTree, Path], None]


ERRANDS = (
    Errand("add_scheme.patch", 4, check_scheme),
    Errand("add_algorithm.patch", 3, check_algorithm),
)


@pytest.mark.parametrize("errand", ERRANDS, ids=lambda errand: errand.patch)
def test_a_patch_fits_the_sources_and_touches_few_files(errand: Errand, tmp_path: Path) -> None:
    files = touched(errand.patch)
    assert 0 < len(files) <= errand.files
    copied(files, tmp_path)
    before = {file: (tmp_path / file).read_bytes() for file in files if (tmp_path / file).is_file()}
    apply(errand.patch, tmp_path)
    assert all((tmp_path / file).read_bytes() != before.get(file) for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("errand", ERRANDS, ids=lambda errand: errand.patch)
def test_what_a_patch_adds_works(errand: Errand, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    with patched(errand.patch, tmp_path / "tree") as tree:
        errand.check(tree, tmp_path)
