"""transformers 4.51 to 4.57: `DeepseekV3ForCausalLM` with a list of experts, one module each."""

from dataclasses import replace

from fxquant.frontend import adapters
from fxquant.frontend.families import transformers_v5

FAMILY = replace(
    transformers_v5.FAMILY,
    name="transformers 4",
    recognises=lambda model: not transformers_v5.has_fused_experts(model),
    adapters=transformers_v5.COMMON
    | {
        "DeepseekV3MoE": adapters.MoE(
            top_k="gate.top_k", n_group="gate.n_group", topk_group="gate.topk_group",
            norm_topk_prob="gate.norm_topk_prob", routed_scaling_factor="gate.routed_scaling_factor",
        ),
    },
)  # fmt: skip
