"""The .pt2 files: they compute what the module computes, bring nothing along, and are the same bytes every time."""

import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ascend_folders import Compiled, compile_folder
from paged import LateNorm
from places import ROOT
from torch._subclasses import FakeTensorMode

from fxquant.lowering.ascend.export.exported import DECODE, PREFILL, write_exported
from fxquant.lowering.ascend.export.fake_weights import fake_weights
from fxquant.models import DecoderLayer
from fxquant.program.program_file import save_program

SEQUENCES, BLOCK_SIZE = 3, 4

RELOAD = """
import importlib.util, sys
from pathlib import Path
import torch
folder = Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("model_ascend", folder / "model_ascend.py")
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
prefill = torch.export.load(folder / "model_ascend_prefill.pt2").module()
decode = torch.export.load(folder / "model_ascend_decode.pt2").module()
loaded = {name for name in sys.modules if name.startswith("fxquant.")}
assert not any(name.startswith(("fxquant.passes", "fxquant.program", "fxquant.tracing")) for name in loaded), loaded
model = module.Model.load(folder, torch.float32)
generator = torch.Generator().manual_seed(0)


def same(caches, graph, own, ids, steps, lengths):
    results = []
    for cache, step in zip(caches, steps):
        given = ids, step.attention_mask, step.position_ids, cache.pages, step.block_table, step.slot_mapping
        if cache is caches[0]:
            results.append(graph(model.weights, *given, *([step.seq_lens] if lengths else [])))
        else:
            results.append(own(*given, step.seq_lens))
        cache.advance(step)
    assert torch.equal(*results)
    for one, other in zip(*(cache.pages for cache in caches)):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


for counts in ([3, 4], [9], [2, 1, 7], [1], [4, 0, 3, 5, 9]):
    caches = [model.paged_cache(len(counts), 40, 4) for _ in range(2)]
    for _ in range(3):
        ids = torch.randint(100, (len(counts), max(counts)), generator=generator)
        rows = zip(counts, caches[0].lengths)
        positions = torch.tensor([[*range(l, l + n), *[-1] * (max(counts) - n)] for n, l in rows])
        same(caches, prefill, model.run_prefill, ids, [cache.prefill_step(positions) for cache in caches], False)
    if len(counts) == 3:
        for _ in range(6):
            ids = torch.randint(100, (3, 1), generator=generator)
            positions = torch.tensor(caches[0].lengths)[:, None]
            same(caches, decode, model.run_decode, ids, [cache.decode_step(positions) for cache in caches], True)
"""

WRITE = """
import sys
from pathlib import Path
from fxquant.lowering.ascend.deployment import deployment
from fxquant.lowering.ascend.export.exported import write_exported
from fxquant.program.program_file import load_program
import torch
program = deployment(load_program(Path(sys.argv[1]))).program
write_exported(program, Path(sys.argv[2]), torch.float32, sequences=3, block_size=4)
"""


LATE = pytest.param(("deepseek_w8a8", LateNorm), marks=pytest.mark.slow)
MIX = pytest.param(("deepseek_w8a8_mix", DecoderLayer), marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[("deepseek_w4a8", DecoderLayer), MIX, LATE])
def exported(
    request: pytest.FixtureRequest, tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Compiled:
    compiled = compile_folder(tiny_folder(), tmp_path_factory.mktemp("exported"), *request.param)
    write_exported(compiled.deployed, compiled.folder, torch.float32, SEQUENCES, BLOCK_SIZE)
    return compiled


def run(script: str, *arguments: Path, hash_seed: int = 0) -> None:
    environment = {"PYTHONHASHSEED": str(hash_seed), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_process_without_passes_runs_them_as_the_module(exported: Compiled) -> None:
    run(RELOAD, exported.folder)


def test_files_hold_no_weight_no_path_and_no_time(exported: Compiled) -> None:
    for file in (PREFILL, DECODE):
        with zipfile.ZipFile(exported.folder / file) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
            assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        constants = sum(len(data) for name, data in entries.items() if "/constants/tensor" in name)
        assert constants == 4 * 4  # the frequencies of the rotary table
        places = {str(ROOT), sys.prefix, sys.base_prefix, str(Path.home())}
        for data in entries.values():
            assert not any(place.encode() in data for place in places)
            assert not re.search(rb"/[\w.-]+/[\w./-]+\.py", data)


@pytest.mark.slow
def test_the_same_graph_gives_the_same_bytes(exported: Compiled, tmp_path: Path) -> None:
    save_program(exported.program, tmp_path / "graph.json")
    (tmp_path / "out").mkdir()
    run(WRITE, tmp_path / "graph.json", tmp_path / "out", hash_seed=7)
    for file in (PREFILL, DECODE):
        hashes = {
            hashlib.sha256((folder / file).read_bytes()).digest() for folder in (exported.folder, tmp_path / "out")
        }
        assert len(hashes) == 1


def test_fake_weights_are_those_that_load_gives(exported: Compiled) -> None:
    names = exported.module().names
    for dtype in (torch.bfloat16, torch.float32):
        loaded = names["Model"].load(exported.folder, dtype).weights
        fake = fake_weights(exported.deployed, names["BLOCKS"], dtype, FakeTensorMode())
        assert list(fake) == list(loaded)
        for key, tensors in loaded.items():
            expected = {name: (tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in tensors.items()}
            assert {
                name: (tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in fake[key].items()
            } == expected
