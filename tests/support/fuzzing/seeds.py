"""The valid files that are mutated, made once: a tiny checkpoint, text, policies, outputs and unfinished work."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import fxquant
from fxquant import CompileOptions
from fxquant.calibration.calibration_file import CALIBRATION, load_calibration
from fxquant.calibration.resume_state import State, save_state
from fxquant.checkpoint.config import parse_config
from fxquant.engines.table import Target
from fxquant.frontend.deepseek_args import hf_to_model_args
from fxquant.lowering.output_folder.manifest import MANIFEST
from fxquant.planning.config_checkpoint import Checkpoint

SHAPE = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "n_routed_experts": 2, "n_group": 1,
    "topk_group": 1, "vocab_size": 128, "num_attention_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32,
}  # fmt: skip
GROUP_SIZE = 64
POLICY = """\
description: static attention, int8 experts
extends: deepseek_w8a8
activation_statistic: batch_mean
smooth:
  - {method: flex, optional: true, why: a model may have none}
rules:
  - {kind: attention, path: "*.kv_b_proj", scheme: FLOAT, why: absorbed}
  - {kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 64}
"""
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}u {{ message['content'] }}
{%- else %} a {{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %} a{% endif %}
"""
CHAT = [{"role": "user", "content": "ab c"}, {"role": "assistant", "content": "de"}]
KEY = {"fxquant": "0", "torch": "0", "source": "0", "text": "0"}


def write_seeds(base: Path) -> Path:
    """Everything under `base`; see the functions."""
    source = write_checkpoint(base / "checkpoint", **SHAPE)
    write_tokenizer(source)
    write_checkpoint(base / "sharded", shards=2, **SHAPE)
    _write_model_args(base / "model_args", source)
    texts = write_texts(base / "texts", source)
    (texts / "policy.yaml").write_text(POLICY)
    chat = Path(shutil.copytree(texts, base / "chat"))
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    for target in (Target.ASCEND, Target.ONNX):
        options = CompileOptions(
            policy=str(texts / "policy.yaml"), out=base / target, target=target, calib=texts / "text.safetensors",
            export=False, verify=False, max_shard_size=40_000 if target is Target.ASCEND else 1 << 30,
        )  # fmt: skip
        fxquant.compile(source, options)
    _write_unfinished(base / "unfinished", base / Target.ASCEND)
    return base


def write_tokenizer(folder: Path) -> None:
    """Byte pairs over 95 letters and three merges, with a chat template both ways."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ"]
    merges = [("a", "b"), ("Ġ", "a"), ("d", "e")]
    vocabulary = {text: index for index, text in enumerate(["<s>", "</s>", *letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_model_args(folder: Path, source: Path) -> None:
    config = parse_config(json.loads((source / "config.json").read_text()), "seed")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_to_model_args(config)))


def write_texts(folder: Path, source: Path) -> Path:
    """The same few tokens as every kind of text, beside the config and tokenizer of `source`."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    documents = ["ab c de", {"text": "c d"}, {"messages": CHAT}, CHAT, [3, 4, 5], [6]]
    (folder / "text.txt").write_text("ab c\nde ab\n")
    (folder / "text.json").write_text(json.dumps(documents))
    (folder / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "chat.jsonl").write_text(json.dumps(CHAT) + "\n")
    ids = torch.randint(3, 98, (2, 12), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, folder / "text.safetensors")
    import numpy

    numpy.save(folder / "text.npy", ids.numpy())
    return folder


def _write_unfinished(folder: Path, output: Path) -> None:
    """A calibration after one block, and a journal of every unit."""
    folder.mkdir()
    transforms = load_calibration(output / CALIBRATION).transforms
    values = {"hidden": [torch.ones(1, 2, 4)], "pair": [(torch.ones(2), torch.zeros(2, dtype=torch.int64))]}
    ranges = {"norm": (torch.zeros(1), torch.ones(1))}
    state = State(1, values, ranges, {"model.layers.1.mlp.gate": torch.ones(2, dtype=torch.int64)}, transforms)
    save_state(state, folder / "state.safetensors", KEY)
    manifest = json.loads((output / MANIFEST).read_text())
    head = {"format": 1, "policy": manifest["policy"], "sources": {"model.safetensors": ["0", 1, 2]}, "layout": "0"}
    units = [{"unit": name, "digests": unit["digests"]} for name, unit in manifest["units"].items()]
    lines = [head, *units, {"complete": "0"}]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def open_seed(folder: Path) -> Checkpoint:
    """The config and tokenizer of a checkpoint folder, as readers of text want them."""
    return Checkpoint(folder, json.loads((folder / "config.json").read_text()), {})
