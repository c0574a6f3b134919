"""Files of token ids for calibration."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def token_ids(path: Path, seed: int) -> Path:
    """`path`, with int64 [4, 24] below the tiny vocabulary."""
    save_file({"ids": torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(seed))}, path)
    return path
