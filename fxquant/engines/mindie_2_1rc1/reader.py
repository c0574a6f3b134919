"""MindIE 2.1.RC1 and earlier: experts with one int4 per int8, group scales rounded into float16, no scale_bias.

Source: msModelSlim's `--mindie_format` and its README. Nobody has held it against such a release.
"""

from functools import partial
from pathlib import Path

from torch import Tensor

from fxquant.engine_readers.folder import stated_number
from fxquant.engine_readers.linear_loader import LinearRules
from fxquant.engine_readers.shared_as_routed import SharedAsRoutedReader, open_model_type
from fxquant.engine_readers.unpacked_experts import load_unpacked

DESCRIPTION = "quant_model_description_w8a8_dynamic.json"
MODEL_TYPE = "deepseekv2"

RULES = LinearRules(reciprocal=False, narrow_scale=False, biased=True)
"""MindIE is not known to use a reciprocal or a narrower weight_scale; deq_scale stays float32 for bfloat16."""


class UnpackedReader(SharedAsRoutedReader):
    """Types are those of the description."""

    def norm(self, module: str) -> tuple[Tensor, Tensor | None]:
        """weight and bias of a norm; the bias is allocated, and then required, if the description names it."""
        described = f"{module}.bias" in self.folder.description
        bias = self.folder.tensor(f"{module}.bias") if described else None
        return self.folder.tensor(f"{module}.weight"), bias


def open_mindie_2_1rc1(folder: Path, ranks: int) -> UnpackedReader:
    """Raises FxquantError for a model_type under which MindIE looks for another model."""
    files, quantization = open_model_type(folder, DESCRIPTION, "MindIE", MODEL_TYPE)
    stated = quantization.get("group_size")
    group_size = None if stated is None else stated_number(folder / "config.json", quantization, "group_size")
    load = partial(load_unpacked, files, ranks=ranks, group_size=group_size)
    return UnpackedReader("mindie-2.1rc1", files, ranks, RULES, load)
