"""genai_config.json: what it says of a graph, and of the sampling in generation_config.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import float_program, write_checkpoint

from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.errors import FxquantError
from fxquant.lowering.onnx.genai_config import genai_config
from fxquant.lowering.output_folder.copies import copied_files

NEUTRAL = {
    "do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "max_length": 1024,
    "past_present_share_buffer": False,
}  # fmt: skip
NUCLEUS = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
BEST = {"do_sample": True, "top_k": 40, "repetition_penalty": 1.1}
SAMPLING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    (NUCLEUS, NUCLEUS),
    (BEST, BEST),
    ({"top_k": -1}, {}),
    ({"top_k": 500}, {}),
]


@pytest.mark.parametrize(("generation", "search"), SAMPLING, ids=str)
def test_sampling_is_that_of_the_checkpoint(
    checkpoint: Checkpoint, tmp_path: Path, generation: dict[str, Any], search: dict[str, Any]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert genai_config(float_program(checkpoint), tmp_path)["search"] == NEUTRAL | search


def test_the_decoder(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    model = genai_config(float_program(tiny(eos_token_id=[1, 2], bos_token_id=0)), tmp_path)["model"]
    tokens = {name: model[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert tokens == {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 1}
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("decoder", 128, 1024)
    decoder = model["decoder"]
    assert decoder["session_options"]["session.x64quantprecision"] == "1"
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 1, 20)
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"


def test_generation_config_ends_a_text_by_its_own_tokens(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3, "pad_token_id": 4}')
    model = genai_config(float_program(tiny(eos_token_id=1)), tmp_path)["model"]
    assert (model["eos_token_id"], model["pad_token_id"]) == ([3], 4)


@pytest.mark.parametrize(("text", "fact"), [('{"top_p": 2}', "top_p"), ("[]", "mapping")])
def test_a_wrong_file_is_named(checkpoint: Checkpoint, tmp_path: Path, text: str, fact: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(FxquantError, match=rf"generation_config.json: .*{fact}(.|\n)*--onnx-cache latent"):
        genai_config(float_program(checkpoint), tmp_path)


def test_the_source_s_own_is_not_copied(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "genai_config.json").write_text("{}")
    assert "genai_config.json" not in copied_files(open_checkpoint(folder))
