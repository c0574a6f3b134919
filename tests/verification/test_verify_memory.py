"""Memory of verification: what a large vocabulary adds, what is said where memory is short, and rows of searches."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from places import ROOT, SUPPORT

import fxquant
from fxquant import CompileOptions
from fxquant.engines.table import Target
from fxquant.errors import FxquantError
from fxquant.processes.memory import memory_for
from fxquant.verification import run

VOCABULARY, WIDTH = 49152, 1024
MEASURE = """
import sys
import torch
from pathlib import Path
from fxquant.api import verify
from fxquant.processes.memory import peak_bytes, resident_bytes
torch.set_num_threads(1)
verify(Path(sys.argv[1]))  # imports, kernels
before = resident_bytes()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
report = verify(Path(sys.argv[2]))
assert report.verdict == "verified", [check.misses for check in report.checks]
print(peak_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", [Target.ASCEND, Target.ONNX])
def test_a_large_vocabulary_is_never_whole_in_memory(
    target: Target, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Embedding and head have 100 MB each as stored, twice that in float32 and four times that in float64."""
    for name, shape in {"small": {}, "large": {"vocab_size": VOCABULARY, "hidden_size": WIDTH}}.items():
        options = CompileOptions(
            policy="deepseek_w4a8_dynamic", target=target, out=tmp_path / name, verify=False, export=False
        )
        fxquant.compile(tiny_folder(**shape), options)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    environment = os.environ | {"PYTHONPATH": f"{SUPPORT}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # less than one of the two matrices as stored and in float32, in which a session or a bound would hold it; what is
    # left, 130 to 230 MB, are nine runs of 4.7 MB of logits, blocks of rows, and pages that the heap keeps
    assert int(done.stdout) < VOCABULARY * WIDTH * 6, done.stdout


def test_too_little_memory_is_told_with_the_way_out() -> None:
    said = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    fact = r"^verify: there is not enough memory: at .* GB .* Free some\.$"
    with pytest.raises(FxquantError, match=fact) as told, memory_for("verify", "Free some."):
        raise RuntimeError(said)
    assert told.value.remedy == "Free some."
    with pytest.raises(FxquantError), memory_for("verify", "Free some."):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="shapes"), memory_for("verify", "Free some."):
        raise RuntimeError("shapes")


def test_a_sample_has_rows_of_searched_modules_and_says_so(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SAMPLE_ABOVE", 0)
    monkeypatch.setattr(run, "SAMPLED_ROWS", 8)
    policy = tmp_path / "clip.yaml"
    policy.write_text(
        "description: all by clip\nextends: deepseek_w4a8_dynamic\nrules:\n"
        "  - {kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: auto, algorithm: clip}\n"
    )
    out = tmp_path / "out"
    fxquant.compile(tiny_folder(), CompileOptions(policy=str(policy), out=out, verify=False, export=False))
    report = fxquant.verify(out)
    (check,) = (check for check in report.checks if check.name == "quantized tensors == slow reference")
    assert report.verdict == "sample verified" and check.worst == "8 rows of each of 24 searched modules"
    assert check.checked == check.total
