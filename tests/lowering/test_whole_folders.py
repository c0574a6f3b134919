"""What an output has of the checkpoint's folder besides weights: model code, licence, card, templates; never run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import FEW_MODULES, write_checkpoint

import fxquant
from fxquant import CompileOptions
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.engines.table import Target
from fxquant.lowering.output_folder.copies import copied_files
from fxquant.lowering.output_folder.manifest import MANIFEST
from fxquant.lowering.output_folder.remote_code import LARGEST, MOST, code_files

CONFIGURATION = """from transformers import PretrainedConfig
from .sizes_of_mine import HIDDEN
class MineConfig(PretrainedConfig):
    model_type = "deepseek_v3"
    hidden = HIDDEN
"""
CODE = {
    "configuration_mine.py": CONFIGURATION,
    "modeling_mine.py": 'raise SystemExit("model code was run")\n',
    "sizes_of_mine.py": "HIDDEN = 99\n",
    "tokenization_mine.py": "class MineTokenizer: ...\n",
}
AUTO_MAP = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}
PAGES = {
    "LICENSE-MODEL": "terms", "README.md": "# The model card", "chat_template.jinja": "{{ messages }}",
    "generation_config.json": "{}", "tokenizer.json": "{}",
    "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}}),
}  # fmt: skip


def with_code(folder: Path, auto_map: Any = AUTO_MAP) -> Path:
    """A checkpoint with everything that a model's page has."""
    model = write_checkpoint(folder, **FEW_MODULES)
    for name, text in (CODE | PAGES).items():
        (model / name).write_text(text)
    (model / "train.py").write_text("not named by anything")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    return model


def compiled(model: Path, out: Path, target: Target = Target.ASCEND) -> Path:
    options = CompileOptions(policy="deepseek_w4a8_per_channel", target=target, out=out, export=False)
    report = fxquant.compile(model, options)
    assert report.verification is not None and report.verification.verdict == "verified"
    return out


def test_a_folder_is_whole_and_transformers_opens_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    model = with_code(tmp_path / "model")
    out = compiled(model, tmp_path / "out", Target.VLLM_ASCEND)
    for name, text in (CODE | PAGES).items():
        assert (out / name.replace("README", "MODEL_CARD")).read_text() == text
    assert not (out / "train.py").exists() and not (out / "README.md").exists()
    config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert config.hidden == 99 and config.num_nextn_predict_layers == 0
    fxquant.convert(out, Target.ASCEND, tmp_path / "converted", export=False)
    for name in (*CODE, "MODEL_CARD.md", "LICENSE-MODEL"):
        assert (tmp_path / "converted" / name).read_bytes() == (out / name).read_bytes()
    (out / MANIFEST).unlink()
    (out / "sizes_of_mine.py").write_text("HIDDEN = 98\n")
    (check,) = [c for c in fxquant.verify(out, model, target=Target.VLLM_ASCEND).checks if c.name.startswith("copied")]
    assert check.misses == ["sizes_of_mine.py: differs from the source"]


def test_what_is_not_there_is_not_announced(tmp_path: Path) -> None:
    model = with_code(tmp_path / "model")
    (model / "modeling_mine.py").unlink()
    out = compiled(model, tmp_path / "out")
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not (out / "configuration_mine.py").exists() and (out / "tokenization_mine.py").exists()


WRONG: list[Any] = [
    {"AutoConfig": "../configuration_mine.Mine"}, {"AutoConfig": "a/b.Mine"}, {"AutoConfig": "configuration_mine"},
    {"AutoConfig": "someone/else--configuration_mine.Mine"}, {"AutoConfig": 3}, {"AutoConfig": "a.b.c"}, {}, None, [],
    {"AutoConfig": "model_ascend.Model"}, {"AutoConfig": "fxquant_x.Model"}, {"AutoConfig": "absent.Mine"},
    {"AutoConfig": "configuration_mine.Mine\n"}, {"AutoConfig": "x" * 200 + ".Mine"},
]  # fmt: skip


@pytest.mark.parametrize("auto_map", WRONG, ids=range(len(WRONG)))
def test_names_are_validated(auto_map: Any, tmp_path: Path) -> None:
    for name in ("configuration_mine.py", "model_ascend.py", "fxquant_x.py"):
        (tmp_path / name).touch()
    assert code_files({"auto_map": auto_map}, tmp_path) is None
    assert code_files({}, tmp_path) == {}


def test_sizes_and_numbers_are_bounded(tmp_path: Path) -> None:
    first = tmp_path / "a0.py"
    for i in range(MOST + 1):
        (tmp_path / f"a{i}.py").write_text(f"from .a{i + 1} import x\n")
    auto_map = {"auto_map": {"AutoConfig": "a0.Mine"}}
    assert code_files(auto_map, tmp_path) is None
    (tmp_path / f"a{MOST}.py").unlink()
    assert len(code_files(auto_map, tmp_path) or {}) == MOST
    first.write_bytes(b"#" * (LARGEST + 1))
    assert code_files(auto_map, tmp_path) is None


def test_a_card_of_the_source_under_our_name_stays(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = with_code(tmp_path / "model")
    (model / "MODEL_CARD.md").write_text("theirs")
    assert copied_files(open_checkpoint(model))["MODEL_CARD.md"] == model / "MODEL_CARD.md"
