"""onnxruntime sends nothing and keeps nothing of its own while fxquant uses it."""

import os
import subprocess
import sys
from pathlib import Path

import fxquant.lowering.onnx

USE = "from fxquant.lowering.onnx.runtime import onnxruntime; onnxruntime.get_available_providers()"


def test_no_device_id_is_kept(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", USE], env=environment, check=True, capture_output=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_nothing_imports_it_otherwise():
    package = Path(fxquant.lowering.onnx.__file__).parents[2]
    for file in package.rglob("*.py"):
        assert file.name == "runtime.py" or "\nimport onnxruntime" not in file.read_text(encoding="utf-8"), file
