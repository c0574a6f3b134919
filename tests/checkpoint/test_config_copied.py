"""config.json in, config.json out: a dtype that it does not say, NaN and large numbers in keys that nobody reads."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ABSENT, float_program, write_checkpoint

from fxquant.api import compile, verify
from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.compilation.options import CompileOptions
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.frontend.source import open_source
from fxquant.lowering.output_folder.description import engine_config
from fxquant.program.program import Program
from fxquant.program.program_file import load_program
from fxquant.verification.document_checks import Documents
from fxquant.verification.report import Check

Folder = Callable[..., Path]


def spoil(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not ABSENT}))
    return folder


def compiled(folder: Path, target: Target) -> tuple[Path, dict[str, Any]]:
    """The output, verified once while it was made and once more on its own."""
    out = folder.parent / f"out-{target}"
    compile(folder, CompileOptions(policy="deepseek_w4a8_dynamic", out=out, target=target))
    assert verify(out, folder).verdict == "verified"
    return out, json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("target", [Target.ASCEND, Target.ONNX])
def test_what_nobody_reads_is_copied_as_it_is(target: Target, tmp_path: Path) -> None:
    folder = spoil(write_checkpoint(tmp_path / "model", dtype=torch.float16), torch_dtype=ABSENT)
    text = (folder / "config.json").read_text()
    unread = '"router_temperature": NaN, "limits": [Infinity, -Infinity], "seed": ' + "9" * 30
    (folder / "config.json").write_text(f'{text[:-1]}, "twice": 1, "twice": 2, {unread}}}')
    out, config = compiled(folder, target)
    assert math.isnan(config["router_temperature"]) and config["limits"] == [math.inf, -math.inf]
    assert (config["seed"], config["twice"]) == (int("9" * 30), 2)
    assert config["torch_dtype"] == "float16"
    assert load_program(out / "fxquant_graph.json").dtype is torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("said", [ABSENT, None])
def test_without_a_dtype_it_is_that_of_the_tensors(dtype: torch.dtype, said: object, tmp_path: Path) -> None:
    folder = spoil(write_checkpoint(tmp_path / "model", dtype=dtype), torch_dtype=said)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype is dtype
    assert checkpoint.config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert open_source(folder).program().dtype is dtype


def test_fp8_tensors_do_not_count(tmp_path: Path) -> None:
    folder = spoil(write_checkpoint(tmp_path / "model", fp8=True), torch_dtype=ABSENT)
    assert open_checkpoint(folder).dtype is torch.bfloat16
    (tmp_path / "config").mkdir()
    (folder / "config.json").rename(tmp_path / "config" / "config.json")
    assert open_source(tmp_path / "config", config_only=True).checkpoint.dtype is torch.bfloat16


def test_transformers_5_says_dtype(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = spoil(write_checkpoint(tmp_path / "model"), torch_dtype=ABSENT, dtype="bfloat16")
    assert "torch_dtype" not in open_checkpoint(folder).config
    spoil(folder, torch_dtype=None)
    assert open_checkpoint(folder).config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("said", ["float64", "auto", [], {}, 5, "x" * 10**5])
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_another_dtype_is_refused_at_once(key: str, said: object, tmp_path: Path) -> None:
    folder = spoil(write_checkpoint(tmp_path / "model"), **({"torch_dtype": ABSENT} | {key: said}))
    with pytest.raises(FxquantError, match=rf"config\.json: {key} is .*\. Use bfloat16, float16, float32") as caught:
        open_checkpoint(folder)
    assert len(caught.value.fact) < 120


def config_of_an_output(folder: Path, program: Program) -> Check:
    """What verification says of `folder`'s config.json, which has to be that of `program`."""
    expected = engine_config(program, ENGINES[Target.ONNX])
    return Documents(folder, {"config.json": (expected, "the graph says")}).check("config.json", ["config.json"])


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("{", "not JSON"),
        ("null", "not a JSON object"),
        ("[]", "not a JSON object"),
        ("[" * 9999, "nested more than 64 levels deep"),
    ],
)
def test_a_spoiled_config_of_an_output_is_named(
    content: str, fact: str, tiny: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(content)
    (miss,) = config_of_an_output(tmp_path, float_program(tiny())).misses
    assert miss.startswith(f"config.json: {fact}")


def test_a_changed_key_of_an_output_is_named(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    program = float_program(tiny())
    program.config |= {"unread": [math.nan, 1]}
    config = engine_config(program, ENGINES[Target.ONNX])
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config_of_an_output(tmp_path, program).ok
    (tmp_path / "config.json").write_text(json.dumps(config | {"unread": [math.nan, 2], "vocab_size": 7}))
    assert config_of_an_output(tmp_path, program).misses == [
        "config.json: unread: [nan, 2], the graph says [nan, 1]",
        "config.json: vocab_size: 7, the graph says 128",
    ]
