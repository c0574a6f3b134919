"""A tiny model with a tokenizer of letters and a chat template, compiled to generate text: import the fixtures."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import FEW_MODULES, write_checkpoint
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from fxquant import CompileOptions, compile
from fxquant.engines.table import Target

BOS, EOS, USER, ASSISTANT, SYSTEM = range(5)
SPECIAL = ["<bos>", "<eos>", "<user>", "<assistant>", "<system>"]
CONTEXT = 64
TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{{- '<' + message.role + '>' + message.content }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def talking_model(folder: Path, **changes: Any) -> Path:
    """A checkpoint of which each letter is a token, and each pair of one of four letters and any; nothing ends it."""
    write_checkpoint(
        folder, bos_token_id=BOS, eos_token_id=None, max_position_embeddings=CONTEXT, **FEW_MODULES, **changes
    )
    words = [*SPECIAL, *LETTERS, *(first + second for first in "ABCD" for second in LETTERS)][:128]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="z"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def talking_output(model: Path, out: Path, target: Target) -> Path:
    """The model compiled, without a look back."""
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=out, target=target, verify=False, export=False)
    return compile(model, options).out


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint. Do not write to it."""
    return talking_model(tmp_path_factory.mktemp("talking") / "model")


@pytest.fixture(scope="session")
def onnx_out(talking: Path) -> Path:
    """Do not write to it."""
    return talking_output(talking, talking.parent / "onnx", Target.ONNX)


@pytest.fixture(scope="session")
def ascend_out(talking: Path) -> Path:
    """Do not write to it."""
    return talking_output(talking, talking.parent / "ascend", Target.ASCEND)


@pytest.fixture(params=["onnx_out", "ascend_out"])
def out(request: pytest.FixtureRequest) -> Path:
    """Each of the two."""
    folder: Path = request.getfixturevalue(request.param)
    return folder
