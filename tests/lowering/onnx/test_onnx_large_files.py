"""Weight files of any size: initializers far inside one, and nothing on the disk besides it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_calls import array, assert_equal, floats, function_model, int8, integers, matmul_bound, restored
from safetensors import safe_open
from tiny import write_checkpoint
from torch import Tensor

from fxquant import CompileOptions, compile, ops
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.engines.table import ENGINES, Target
from fxquant.lowering.onnx.extract import EXTERNAL_FOLDER
from fxquant.lowering.onnx.functions import VIEWS
from fxquant.lowering.onnx.initializers import View, external
from fxquant.lowering.onnx.runner import session_options
from fxquant.lowering.onnx.shapes import DTYPES
from fxquant.lowering.output_folder.layout import FileLayout, StoredTensor, plan_files
from fxquant.schemes.schemes import Scheme, TensorSpec
from fxquant.storage.safetensors import TensorInfo, read_header
from fxquant.storage.whole_calls import write_at

GIB = 1 << 30
FEATURES, OUT = 96, 24
HOLES = {
    "hole of 2 GB": (torch.int64, 2 * GIB),
    "b, hole up to 4 GB": (torch.int8, 2 * GIB),
    "d, hole up to 50 GB": (torch.int8, 46 * GIB),
}
"""Tensors of zeros that take no space on the disk. In a file, tensors lie by item size, then by name."""
WEIGHTS = {
    "scale": floats(OUT, 1, seed=3).abs(),
    "second": integers(1, 16, OUT, FEATURES // 32, dtype=torch.int32).float(),
    "float weight": floats(OUT, FEATURES).bfloat16(),
    "c, int8 weight": int8(OUT, FEATURES, seed=1),
    "e, int4 weight": int8(OUT // 2, FEATURES, seed=2),
}


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[dict[str, TensorInfo]]:
    """HOLES and WEIGHTS in one file, laid out as outputs are, whose holes were never written."""
    (layout,) = plan_files([*_stored(HOLES), *_stored_weights()], 1 << 40, ENGINES[Target.ONNX])
    path = tmp_path / layout.name
    _write_sparse(path, layout)
    if path.stat().st_blocks * 512 > GIB:
        pytest.skip("holes of a file take space on this filesystem")
    yield read_header(path)
    path.unlink()


def _stored(holes: dict[str, tuple[torch.dtype, int]]) -> list[StoredTensor]:
    return [
        StoredTensor(name, TensorSpec(dtype, (size // dtype.itemsize,), Scheme.FLOAT.value), "")
        for name, (dtype, size) in holes.items()
    ]


def _stored_weights() -> list[StoredTensor]:
    return [
        StoredTensor(name, TensorSpec(weight.dtype, tuple(weight.shape), Scheme.FLOAT.value), "")
        for name, weight in WEIGHTS.items()
    ]


def _write_sparse(path: Path, layout: FileLayout) -> None:
    if shutil.disk_usage(path.parent).free < GIB:
        pytest.skip(f"less than 1 GiB free in {path.parent}")
    with path.open("wb") as file:
        try:
            file.truncate(layout.nbytes)
        except OSError as error:
            pytest.skip(f"this filesystem has no files of {layout.nbytes:,} bytes: {error.strerror}")
        write_at(file.fileno(), layout.header, 0)
        for tensor, offset in zip(layout.tensors, layout.offsets, strict=True):
            if tensor.name in WEIGHTS:
                write_at(file.fileno(), WEIGHTS[tensor.name].view(torch.uint8).numpy().tobytes(), offset)


def run(tensors: dict[str, TensorInfo], target: Any, feeds: dict[str, Tensor], stored: dict[str, str]) -> Tensor:
    """The operator's function over stored tensors, by argument, and `feeds`."""
    values: dict[str, Any] = {argument.name: None for argument in target._schema.arguments}
    for name, value in feeds.items():
        dtype = ir.DataType.UINT8 if value.dtype is torch.int8 else DTYPES[value.dtype]
        values[name] = ir.Value(name=name, shape=ir.Shape([None, value.shape[-1]]), type=ir.TensorType(dtype))
    for argument, name in stored.items():
        values[argument] = external(tensors, name, VIEWS.get((target, argument), View.STORED))
    options = session_options()
    options.add_session_config_entry(EXTERNAL_FOLDER, str(next(iter(tensors.values())).file.parent))
    session = onnxruntime.InferenceSession(function_model(target, values).SerializeToString(), options)
    return restored(session.run(None, {name: array(value) for name, value in feeds.items()})[0])


@pytest.mark.slow
def test_a_session_reads_initializers_past_50_gb(sparse: dict[str, TensorInfo]):
    starts = {name: sparse[name].start for name in WEIGHTS}
    assert 2 * GIB < starts["float weight"] < 4 * GIB < starts["c, int8 weight"] < 50 * GIB < starts["e, int4 weight"]
    with safe_open(sparse["scale"].file, framework="numpy") as file:  # that of torch maps all of it as its own memory
        for name in ("scale", "second", "c, int8 weight", "e, int4 weight"):
            assert torch.equal(torch.from_numpy(file.get_tensor(name)), WEIGHTS[name])
    x, scale, wide = int8(5, FEATURES), floats(5, 1).abs(), floats(5, FEATURES, seed=7)
    eight = {"weight": "c, int8 weight", "weight_scale": "scale"}
    four = {"weight": "e, int4 weight", "weight_scale": "scale", "weight_scale_second": "second"}
    steps = {"x": x, "x_scale": scale}
    assert_equal(
        [
            (run(sparse, target, steps, names), target(*steps.values(), *(WEIGHTS[name] for name in names.values())))
            for target, names in ((ops.per_token_linear, eight), (ops.per_token_int4_linear, four))
        ]
    )
    weight = WEIGHTS["float weight"].float()
    off = (run(sparse, ops.linear, {"x": wide}, {"weight": "float weight"}) - ops.linear(wide, weight)).abs()
    assert (off <= matmul_bound(wide, weight)).all()


WIDE = {"hidden_size": 2048, "intermediate_size": 4096, "moe_intermediate_size": 512, "vocab_size": 8192}


@pytest.mark.slow
@pytest.mark.parametrize("profile", OnnxProfile)
def test_a_folder_takes_no_more_than_its_weight_file(tmp_path: Path, profile: OnnxProfile):
    model = write_checkpoint(tmp_path / "model", **WIDE)
    out = tmp_path / "out"
    options = CompileOptions(
        policy="deepseek_w4a8_dynamic", target=Target.ONNX, out=out, onnx_profile=profile, verify=False
    )
    compile(model, options)
    sizes = {file: file.stat().st_size for file in out.rglob("*") if file.is_file()}
    weights = sum(size for file, size in sizes.items() if file.suffix == ".safetensors")
    assert sum(sizes.values()) <= 1.02 * weights
