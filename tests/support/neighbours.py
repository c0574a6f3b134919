"""Tiny models with what sets DeepSeek-V3's neighbours apart from it, as arguments of `write_checkpoint`."""

from typing import Any

from tiny import YARN

NEIGHBOURS: dict[str, dict[str, Any]] = {
    "Kimi-K2": {
        "model_type": "kimi_k2", "fp8": True, "n_group": 1, "topk_group": 1, "n_routed_experts": 12,
        "num_experts_per_tok": 4, "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
        "rope_scaling": {**YARN, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
    },
    # int4 rows of 192 or 1408 are no multiple of 256, but of 64
    "Moonlight": {
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "moe_intermediate_size": 192,
        "intermediate_size": 384, "rope_theta": 50000.0, "rms_norm_eps": 1e-5, "routed_scaling_factor": 2.446,
    },
    "all dense": {"first_k_dense_replace": 2},
    "more dense layers than layers, with MTP": {"first_k_dense_replace": 9, "num_nextn_predict_layers": 1},
    "shared experts null": {"n_shared_experts": None},
    "two MTP layers": {"num_nextn_predict_layers": 2},
}  # fmt: skip
