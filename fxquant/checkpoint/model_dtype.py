"""Model dtype, also for a config.json that does not state it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fxquant.checkpoint.model_parallel_parts import SourceTensor
from fxquant.errors import FxquantError
from fxquant.inputs.validation import shown

MODEL_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_KEYS = ("torch_dtype", "dtype")
"""transformers 5 writes the second key."""


def with_dtype(config: dict[str, Any], tensors: Iterable[SourceTensor], place: Path) -> dict[str, Any]:
    """`config`; if it states no dtype, `torch_dtype` is set to the dtype with the most bytes in `tensors`.

    FP8 tensors do not count; without others it is bfloat16. Raises FxquantError for an unsupported dtype; `place` is
    the config's file.
    """
    given = next((key for key in DTYPE_KEYS if config.get(key) is not None), None)
    if given is not None:
        model_dtype(config, place)
        return (
            config
            if given == DTYPE_KEYS[0] or DTYPE_KEYS[0] not in config
            else {**config, DTYPE_KEYS[0]: config[given]}
        )
    sizes = dict.fromkeys(MODEL_DTYPES, 0)
    names = {dtype: name for name, dtype in MODEL_DTYPES.items()}
    for tensor in tensors:
        if tensor.dtype in names:
            sizes[names[tensor.dtype]] += tensor.nbytes
    return {**config, DTYPE_KEYS[0]: max(sizes, key=lambda name: sizes[name])}


def model_dtype(config: dict[str, Any], place: Path) -> torch.dtype:
    """The dtype in `config`, or bfloat16 if it states none."""
    key = next((key for key in DTYPE_KEYS if config.get(key) is not None), DTYPE_KEYS[0])
    name = config.get(key, "bfloat16")
    if not isinstance(name, str) or name not in MODEL_DTYPES:
        raise FxquantError(place, f"{key} is {shown(name)}.", f"Use {', '.join(MODEL_DTYPES)}.")
    return MODEL_DTYPES[name]
