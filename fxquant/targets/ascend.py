"""The common Ascend form: dialect A, which SGLang-NPU and vllm-ascend releases up to 2026-07 load."""

from fxquant.schemes.weight_formats import Dialect
from fxquant.targets.engine import Engine, scheme_keys, versioned_header

ENGINE = Engine(
    dialect=lambda group_size: Dialect.A,
    stem="quant_model_weight_w8a8",
    description="quant_model_description.json",
    header=versioned_header,
    config=scheme_keys,
    reader=lambda group_size: "vllm-ascend-per-group" if group_size else "sglang-npu",
)
