"""SGLang on NPU, whose reader takes two-level files for a positive group_size and per-channel ones for 0."""

from fxquant.engines.engine import Engine, scheme_keys, versioned_header
from fxquant.schemes.weight_formats import WeightFormat

ENGINE = Engine(
    weight_format=lambda group_size: WeightFormat.PACKED if group_size else WeightFormat.PER_CHANNEL,
    stem="quant_model_weights",
    numbered=True,
    description="quant_model_description.json",
    header=versioned_header,
    config=scheme_keys,
    mtp_files=False,
    reader=lambda group_size: "sglang-npu",
)
