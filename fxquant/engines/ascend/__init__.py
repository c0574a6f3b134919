"""The common Ascend form: format `packed`, which SGLang-NPU and vllm-ascend releases up to 2026-07 load."""

from fxquant.engines.engine import Engine, scheme_keys, versioned_header
from fxquant.schemes.weight_formats import WeightFormat

ENGINE = Engine(
    weight_format=lambda group_size: WeightFormat.PACKED,
    stem="quant_model_weight_w8a8",
    description="quant_model_description.json",
    header=versioned_header,
    config=scheme_keys,
    reader=lambda group_size: "vllm-ascend-per-group" if group_size else "sglang-npu",
)
