"""A config.json without weights: what works with it, and what refuses it before a model.py runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Fxquant
from tiny import tiny_config, write_checkpoint

from fxquant.errors import FxquantError
from fxquant.frontend.named_checkpoint import named_checkpoint
from fxquant.frontend.source import open_source

V32_ARGS: dict[str, Any] = {
    "vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61, "n_dense_layers": 3,
    "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 8, "n_expert_groups": 8,
    "n_limited_groups": 4, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8", "scale_fmt": "ue8m0",
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048, "max_batch_size": 1, "max_seq_len": 163840,
}  # fmt: skip
"""What DeepSeek publishes with V3.2-Exp as config_671B_v3.2.json."""
SPARSE = {
    "deepseek_v32": tiny_config(model_type="deepseek_v32", index_topk=2048, index_n_heads=64, index_head_dim=128),
    "its keys under deepseek_v3": tiny_config(index_topk=2048),
    "its ModelArgs": V32_ARGS,
}
OWN = """
from pathlib import Path

from fxquant.models import DeepseekV3

Path(__file__).with_name("ran").touch()
CHECKPOINT = "weights"


def build_model(config):
    return DeepseekV3(config)
"""


def only_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def own_model(folder: Path, config: dict[str, Any]) -> Path:
    """A model.py whose checkpoint folder holds only `config`."""
    only_config(folder / "weights", config)
    (folder / "model.py").write_text(OWN)
    return folder / "model.py"


# what works


def test_show_gives_the_graph_that_the_weights_have(fxquant_: Fxquant, tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole")
    folder = only_config(tmp_path / "config", json.loads((whole / "config.json").read_text()))
    shown = [fxquant_("show", model, "--hash") for model in (whole, folder, folder / "config.json")]
    assert len(set(shown)) == 1 and shown[0][0] == 0, shown
    code, out, _ = fxquant_("show", folder / "config.json", "--block", "model.layers.1")
    assert code == 0 and "mlp_experts: f32[batch, sequence, 256] = moe_experts(" in out


def test_targets_take_the_file_the_folder_and_a_model_py(fxquant_: Fxquant, tmp_path: Path) -> None:
    file = own_model(tmp_path, tiny_config())
    options = ("--policy", "deepseek_w8a8", "--target", "ascend", "--tp", 1, "--json")
    tables = [fxquant_("targets", model, *options)[:2] for model in (tmp_path / "weights", file)]
    tables.append(fxquant_("targets", tmp_path / "weights" / "config.json", *options)[:2])
    assert tables[0][0] == 0 and tables.count(tables[0]) == 3, tables


def test_show_of_a_model_py_needs_no_weights(fxquant_: Fxquant, tmp_path: Path) -> None:
    code, out, err = fxquant_("show", own_model(tmp_path, tiny_config(router_temperature=2.0)))
    said = "keys that are not read and may change the model: router_temperature"
    assert code == 0 and "structural hash" in out and said in out and said not in err
    code, out, err = fxquant_("show", tmp_path / "weights", "--hash")
    assert code == 0 and len(out.split()) == 1 and said in err


# what is refused


@pytest.mark.parametrize("verb", ["compile", "plan", "show", "targets"])
@pytest.mark.parametrize("config", SPARSE.values(), ids=SPARSE)
def test_v32_is_refused_with_the_reason_everywhere(
    verb: str, config: dict[str, Any], fxquant_: Fxquant, tmp_path: Path
) -> None:
    folder = only_config(tmp_path / "model", config)
    if verb == "compile":
        write_checkpoint(tmp_path / "weights")
        (tmp_path / "weights" / "model.safetensors").rename(folder / "model.safetensors")
    code, _, err = fxquant_(verb, folder)
    assert code == 1 and "chosen by an indexer" in " ".join(err.split()), err


def test_compile_refuses_a_model_py_without_weights_before_it_runs(fxquant_: Fxquant, tmp_path: Path) -> None:
    file = own_model(tmp_path, tiny_config())
    code, _, err = fxquant_("compile", file, "-o", tmp_path / "out")
    assert code == 1 and "no safetensors file" in err and "plan, show and targets need only" in " ".join(err.split())
    assert not (tmp_path / "ran").exists()
    assert fxquant_("plan", file)[0] == 0 and (tmp_path / "ran").exists()


@pytest.mark.parametrize("verb", ["plan", "show", "targets"])
def test_a_config_that_is_refused_is_so_before_a_model_py_runs(verb: str, fxquant_: Fxquant, tmp_path: Path) -> None:
    code, _, err = fxquant_(verb, own_model(tmp_path, tiny_config(sliding_window=64)))
    assert code == 1 and "sliding_window: 64: attention would not see every earlier token" in err
    assert not (tmp_path / "ran").exists()


def test_a_given_checkpoint_is_looked_at_first_too(tmp_path: Path) -> None:
    file = own_model(tmp_path, tiny_config())
    only_config(tmp_path / "other", tiny_config(qk_norm=True))
    with pytest.raises(FxquantError, match="qk_norm: true: there would be norms"):
        open_source(file, tmp_path / "other", config_only=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ('CHECKPOINT = "weights"', True),
        ('"""\nCHECKPOINT = "weights"\n"""', False),
        ('CHECKPOINT = "weights"\nCHECKPOINT = "other"', False),
        ('CHECKPOINT = "weights"\nif 1:\n    CHECKPOINT = "other"', False),
        ('CHECKPOINT = "weights" + ""', False),
        ('CHECKPOINT = "absent"', False),
        ('CHECKPOINT = "we\\0ights"', False),
        ("CHECKPOINT = 3", False),
        ("CHECKPOINT =", False),
        ("(" * 100_000, False),
        ("", False),
    ],
)
def test_only_a_plain_name_is_read_from_the_text(text: str, there: bool, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.py").write_text(text)
    assert named_checkpoint(tmp_path / "model.py") == (tmp_path / "weights" if there else None)
