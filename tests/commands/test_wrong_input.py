"""Wrong input: one screen that names the place, the fact and the way out; nothing under the final name."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_checkpoint

from fxquant.tools.main import run

Fxquant = Callable[..., tuple[int, str]]


@pytest.fixture
def fxquant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fxquant:
    """Run the command in this process: exit code, and stderr on a screen 100 columns wide."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fxquant", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as stop:
            run()
        return int(stop.value.code or 0), capsys.readouterr().err

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint that a test may spoil, with token ids to calibrate on beside it."""
    path = write_checkpoint(tmp_path / "model", shards=2)
    save_file({"ids": torch.arange(24).view(2, 12)}, tmp_path / "ids.safetensors")
    return path


def refused(fxquant: Fxquant, folder: Path, *words: str, options: tuple = ("-p", "deepseek_w4a8_dynamic")) -> None:
    """Compile fails with all `words` on one screen, and leaves nothing."""
    out = folder.parent / "out"
    code, text = fxquant("compile", folder, "-o", out, "--quiet", *options)
    assert code == 1
    plain = "".join(text.replace("│", " ").split())  # a long path breaks at any letter
    missing = [word for word in words if "".join(word.split()) not in plain]
    assert not missing, f"{missing} not in:\n{text}"
    assert len(text.splitlines()) <= 24
    assert "Traceback" not in text
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith("out")] == []


def spoil_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_not_a_checkpoint(fxquant: Fxquant, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(fxquant, tmp_path / "empty", "not a checkpoint", "config.json", "Hugging Face")


def test_nothing_there(fxquant: Fxquant, tmp_path: Path) -> None:
    refused(fxquant, tmp_path / "nowhere", "no such file or folder")


def test_missing_shard(fxquant: Fxquant, folder: Path) -> None:
    shard = first_shard(folder)
    shard.unlink()
    refused(fxquant, folder, shard.name, "missing shard (1 of 2)")


def test_truncated_shard(fxquant: Fxquant, folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(fxquant, folder, shard.name, "truncated", "again")


def test_tensor_of_the_wrong_shape(fxquant: Fxquant, folder: Path) -> None:
    shard = first_shard(folder)
    tensors = load_file(shard)
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.ndim == 2)
    save_file({**tensors, name: tensors[name][:-1].clone()}, shard)
    rows, columns = tensors[name].shape
    refused(fxquant, folder, name, f"[{rows - 1}, {columns}]", f"[{rows}, {columns}]")


def test_other_architecture(fxquant: Fxquant, folder: Path) -> None:
    spoil_config(folder, model_type="qwen3")
    refused(fxquant, folder, "model_type is 'qwen3'", "DeepSeek-V3, DeepSeek-R1")


def test_unknown_policy(fxquant: Fxquant, folder: Path) -> None:
    refused(fxquant, folder, "policy deepseek_w2", "unknown", "deepseek_w4a8", options=("-p", "deepseek_w2"))


def test_policy_with_a_typo(fxquant: Fxquant, folder: Path) -> None:
    policy = folder.parent / "mine.yaml"
    policy.write_text("rules:\n  - {kind: attention, scheme: W8A8, optinal: true}\n")
    refused(fxquant, folder, "mine.yaml:2", "rules.0.optinal", "unknown key", "optional?", options=("-p", policy))


def test_rule_that_matches_nothing(fxquant: Fxquant, folder: Path) -> None:
    policy = folder.parent / "mine.yaml"
    policy.write_text("extends: deepseek_w4a8_dynamic\nrules:\n  - {path: '*.q_c_proj', scheme: FLOAT}\n")
    refused(
        fxquant,
        folder,
        "mine.yaml:3",
        "*.q_c_proj",
        "matches no path",
        "*.q_a_proj",
        "optional: true",
        options=("-p", policy),
    )


def test_linear_that_no_rule_covers(fxquant: Fxquant, folder: Path) -> None:
    policy = folder.parent / "mine.yaml"
    policy.write_text("rules:\n  - {kind: attention, scheme: W8A8_DYNAMIC}\n")
    refused(fxquant, folder, "no rule covers", "dense_mlp", options=("-p", policy))


def test_output_that_is_not_empty(fxquant: Fxquant, folder: Path) -> None:
    out = folder.parent / "kept"
    arguments = ("compile", folder, "-p", "deepseek_w4a8_dynamic", "-o", out, "--quiet", "--no-verify")
    assert fxquant(*arguments)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, text = fxquant(*arguments)
    assert (code, "--force" in text) == (1, True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_force_replaces_only_what_fxquant_wrote(fxquant: Fxquant, folder: Path) -> None:
    mine = folder.parent / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("years of work")
    code, text = fxquant("compile", folder, "-o", mine, "--force", "-p", "deepseek_w4a8_dynamic")
    assert (code, "not an output of fxquant" in text) == (1, True)
    assert (mine / "chapter.txt").read_text() == "years of work"


def test_hidden_size_not_a_multiple_of_the_group_size(fxquant: Fxquant, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", hidden_size=320)
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "extends: deepseek_w4a8_dynamic\nrules: [{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 256}]"
    )
    words = ("experts.gate_proj", "in_features 320", "group_size 256", "group_size: 64")
    refused(fxquant, folder, *words, options=("-p", policy))


def test_no_calibration_text(fxquant: Fxquant, folder: Path) -> None:
    refused(fxquant, folder, "calibration text", "--calib", "deepseek_w4a8_dynamic", options=("-p", "deepseek_w4a8"))


def test_calibration_without_a_tokenizer(fxquant: Fxquant, folder: Path) -> None:
    text = folder.parent / "text.txt"
    text.write_text("some words")
    refused(fxquant, folder, "tokenizer.json", options=("-p", "deepseek_w4a8", "--calib", text))


def test_int8_kv_cache(fxquant: Fxquant, folder: Path) -> None:
    refused(fxquant, folder, "--kv-cache int8", "latent", options=("--kv-cache", "int8"))


def test_unknown_target(fxquant: Fxquant, folder: Path) -> None:
    targets = "ascend, mindie, mindie-2.1rc1, vllm-ascend, sglang-npu, onnx"
    refused(fxquant, folder, "--target tpu", targets, options=("--target", "tpu"))


def test_nan_in_a_weight(fxquant: Fxquant, folder: Path) -> None:
    shard = first_shard(folder)
    tensors = load_file(shard)
    name = next(name for name in sorted(tensors) if name.endswith("_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, shard)
    refused(fxquant, folder, name, "NaN")


def test_model_file_that_fails(fxquant: Fxquant, folder: Path) -> None:
    model = folder.parent / "model.py"
    model.write_text("CHECKPOINT = 'model'\ndef build_model(config):\n    return config.no_such_key\n")
    refused(fxquant, model, "build_model failed", "no_such_key", "line 3")


def test_folder_that_is_not_an_output(fxquant: Fxquant, folder: Path) -> None:
    for verb in (("verify", folder), ("run", folder, "--prompt", "x"), ("eval", folder, "--text", folder)):
        code, text = fxquant(*verb)
        assert (code, "not an output of fxquant" in text) == (1, True)
