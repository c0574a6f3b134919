"""Recover the token ids that recorded activations came from, so that a calibration can be repeated.

usage: recover_tokens.py REFERENCE_DIR OUT.safetensors

The input of the first layer's q_a_proj is the normalized embedding of each token: the nearest row of the model's own
normalized embedding table is the token. REFERENCE_DIR holds `model/` and `v0_bf16_acts.safetensors`.
"""

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FIRST = "model.layers.0.self_attn.q_a_proj."


def recover(reference: Path) -> torch.Tensor:
    """Token ids int64 [batches, length]."""
    with safe_open(reference / "model" / "model.safetensors", "pt") as model:
        table = model.get_tensor("model.embed_tokens.weight").float()
        gamma = model.get_tensor("model.layers.0.input_layernorm.weight").float()
    table = table * torch.rsqrt(table.pow(2).mean(-1, keepdim=True) + 1e-6) * gamma
    with safe_open(reference / "v0_bf16_acts.safetensors", "pt") as recorded:
        names = [name for name in list(recorded.keys()) if name.startswith(FIRST)]
        batches = sorted(names, key=lambda name: int(name.split(".")[-1]))
        inputs = [recorded.get_tensor(name)[0].float() for name in batches]
    return torch.stack([torch.cdist(rows, table).argmin(-1) for rows in inputs])


if __name__ == "__main__":
    Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
    save_file({"input_ids": recover(Path(sys.argv[1]))}, sys.argv[2])
