"""transformers 5.0 to 5.12: as later releases, but the gate gives logits, and the MoE chooses experts by them."""

from dataclasses import replace

from fxquant.frontend import adapters
from fxquant.frontend.families import transformers_v5
from fxquant.frontend.recognition.published import version_of

MOE = adapters.MoE(
    gate_up_proj="gate_up_proj", down_proj="down_proj", top_k="top_k", n_group="n_group", topk_group="topk_group",
    norm_topk_prob="norm_topk_prob", routed_scaling_factor="routed_scaling_factor",
)  # fmt: skip
FAMILY = replace(
    transformers_v5.FAMILY,
    name="transformers 5.0",
    recognises=lambda model: transformers_v5.has_fused_experts(model) and not transformers_v5.gate_chooses(model),
    adapters=transformers_v5.COMMON | transformers_v5.EXPERTS | {"DeepseekV3MoE": MOE},
    requires=transformers_v5.REQUIRES
    | {
        "DeepseekV3MoE": transformers_v5.REQUIRES["DeepseekV3MoE"]
        | {"gate": lambda gate: version_of(gate, transformers_v5.FAMILY.versions) is not None},
    },
)  # fmt: skip
