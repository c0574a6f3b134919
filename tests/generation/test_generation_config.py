"""generation_config.json: what it says holds, options overrule it, and what is not supported is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import FxquantError
from fxquant.generation.generation_config import HARMLESS, NEUTRAL, GenerationConfig, read_generation_config
from fxquant.generation.options import GenerateOptions
from fxquant.generation.sampling import Sampling

OF_DEEPSEEK = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 1, "bos_token_id": 0}


def read(folder: Path, document: Any) -> GenerationConfig:
    (folder / "generation_config.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return read_generation_config(folder)


@pytest.mark.parametrize(
    "document, options, expected",
    [
        (None, {}, Sampling()),
        ({"do_sample": False, "temperature": 0.6}, {}, Sampling()),
        ({"temperature": 0.6}, {}, Sampling()),
        (OF_DEEPSEEK, {}, Sampling(0.6, top_p=0.95)),
        (OF_DEEPSEEK, {"greedy": True, "seed": 4}, Sampling(seed=4)),
        (OF_DEEPSEEK, {"temperature": 0.0}, Sampling(0, top_p=0.95)),
        (OF_DEEPSEEK, {"temperature": 1.5, "top_k": 3, "seed": 2}, Sampling(1.5, 3, 0.95, seed=2)),
        (OF_DEEPSEEK, {"top_p": 1.0}, Sampling(0.6)),
        (OF_DEEPSEEK | {"top_k": -1, "min_p": 0.1}, {}, Sampling(0.6, 0, 0.95, 0.1)),
        ({"do_sample": False, "temperature": 0.6}, {"top_k": 5}, Sampling(0.6, 5)),
        ({"do_sample": True}, {}, Sampling(1.0)),
        (None, {"top_p": 0.5}, Sampling(1.0, top_p=0.5)),
        ({"repetition_penalty": 1.2}, {}, Sampling(repetition_penalty=1.2)),
        ({"do_sample": True, "temperature": 0}, {}, Sampling()),
    ],
    ids=str,
)  # fmt: skip
def test_options_overrule_the_file(document: Any, options: Any, expected: Sampling, tmp_path: Path) -> None:
    config = read_generation_config(tmp_path) if document is None else read(tmp_path, document)
    assert GenerateOptions(**options).sampling(config) == expected


def test_end_tokens_and_stop_words(tmp_path: Path) -> None:
    assert read(tmp_path, {}).end_ids is None and read(tmp_path, {}).stops == []
    config = read(tmp_path, {"eos_token_id": [1, 7], "stop_strings": "END", "max_length": 9, "max_new_tokens": 3})
    assert (config.end_ids, config.stops, config.max_length, config.max_new_tokens) == ({1, 7}, ["END"], 9, 3)
    assert read(tmp_path, {"stop_strings": ["a", "b"]}).stops == ["a", "b"]


def test_what_changes_the_text_is_refused_by_name(tmp_path: Path) -> None:
    document = {"num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 1.0, "bad_words_ids": [], "min_length": 0}
    with pytest.raises(FxquantError) as caught:
        read(tmp_path, document)
    assert caught.value.fact == "changes the text by no_repeat_ngram_size, num_beams: not supported."
    assert "--no-generation-config" in caught.value.remedy


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    config = read(tmp_path, {"chat_format": "chatml", "max_window_size": 8, "use_cache": True, "top_h": None})
    assert config.unknown == ["chat_format", "max_window_size"]


def test_every_key_of_transformers_is_used_refused_or_harmless() -> None:
    transformers = pytest.importorskip("transformers")
    keys = set(transformers.GenerationConfig().to_dict())
    assert keys <= set(GenerationConfig.model_fields) | set(NEUTRAL) | HARMLESS


def test_what_transformers_writes_by_default_is_neutral(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    defaults = getattr(transformers.GenerationConfig, "_get_default_generation_params", dict)()
    assert read(tmp_path, defaults).unknown == []


@pytest.mark.parametrize(
    "document, words",
    [
        ({"temperature": "hot"}, "temperature"), ({"top_p": 1.5}, "top_p"), ({"top_k": 0.5}, "top_k"),
        ({"eos_token_id": "x"}, "eos_token_id"), ({"do_sample": 1}, "do_sample"), ({"temperature": -1}, "temperature"),
        ([], "not a JSON object"), ("{", "generation_config.json"), ('{"temperature": NaN}', "generation_config.json"),
        ({"stop_strings": [1]}, "stop_strings"),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_that_is_wrong_is_refused_with_its_key(document: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=words):
        read(tmp_path, document)


@pytest.mark.parametrize(
    "options, place",
    [
        ({"greedy": True, "temperature": 1.0}, "--greedy"),
        ({"system": "x"}, "--system"),
        ({"stop": ["a", ""]}, "--stop"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], place: str) -> None:
    with pytest.raises(FxquantError, match=place):
        GenerateOptions(**options)
