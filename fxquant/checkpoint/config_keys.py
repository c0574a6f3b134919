"""Keys of a config.json besides those that define the model: which change nothing, and which would change it.

Whatever is in neither table and is not read is reported, since nobody here knows what it does.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fxquant.inputs.validation import cut, nearest, shown

ALIASES = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
"""transformers' second name of a key → the key."""

INERT_KEYS = """
    architectures auto_map _name_or_path name_or_path _commit_hash _attn_implementation _attn_implementation_internal
    _attn_implementation_autoset _from_model_config transformers_version torch_dtype dtype torchscript use_bfloat16
    quantization_config unsloth_version unsloth_fixed
    use_cache cache_implementation initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop dropout
    aux_loss_alpha seq_aux router_aux_loss_coef router_z_loss_coef router_jitter_noise output_router_logits
    pretraining_tp ep_size tp_size model_max_length seq_length max_seq_len
    output_attentions output_hidden_states output_scores output_logits return_dict return_dict_in_generate
    problem_type id2label label2id num_labels finetuning_task task_specific_params prefix is_decoder is_encoder_decoder
    add_cross_attention cross_attention_hidden_size tie_encoder_decoder chunk_size_feed_forward pruned_heads
    tf_legacy_loss tokenizer_class sep_token_id pad_token_id decoder_start_token_id bos_token_id eos_token_id
    forced_bos_token_id forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens remove_invalid_values
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups
    num_return_sequences temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty
    encoder_repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    exponential_decay_length_penalty assistant_confidence_threshold assistant_lookbehind target_lookbehind
    num_assistant_tokens num_assistant_tokens_schedule use_mtp
"""
INERT = frozenset(INERT_KEYS.split())
"""Keys that change no number of the model: names, training, sampling, the layout of a cache, generation's tokens."""

OFF: tuple[Any, ...] = (None, False, 0, [], {})
"""Values with which a key switches nothing on."""
ONE: tuple[Any, ...] = (None, 1)
"""Values with which a factor is none."""
ROTARY = "part of the rotary features would not be rotated, or by other angles"

EFFECTS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (
        "attention would be sparse, chosen by an indexer as in DeepSeek-V3.2",
        OFF,
        "index_topk index_n_heads index_head_dim index_topk_freq indexer_types indexer_rope_interleave",
    ),
    (
        "attention would not see every earlier token",
        OFF,
        "sliding_window use_sliding_window window_size attention_window_size sliding_window_pattern "
        "attention_chunk_size linear_attn_config compress_ratios compress_rates compress_rope_theta",
    ),
    ("attention would not see every earlier token", (*OFF, "full_attention"), "layer_types"),
    ("attention would see later tokens too", (None, True), "is_causal"),
    ("attention would have no latents", (None, True), "use_mla"),
    ("attention would be gated", OFF, "attn_output_gate gated_attention use_attention_gate"),
    (
        "scores, activations or logits would be capped",
        OFF,
        "attn_logit_softcapping final_logit_softcapping router_logit_softcapping logits_soft_cap logit_cap "
        "swiglu_limit swiglu_limits clip_qkv",
    ),
    (
        "linears would have biases that DeepSeek-V3 lacks",
        OFF,
        "mlp_bias qkv_bias use_qkv_bias use_bias lm_head_bias add_bias_linear",
    ),
    ("there would be norms that DeepSeek-V3 lacks", OFF, "use_qk_norm qk_norm sandwich_norm use_post_norm post_norm"),
    (
        "values would be scaled, which DeepSeek-V3 does not do",
        ONE,
        "embedding_multiplier residual_multiplier logits_scaling scale_emb emb_scale",
    ),
    (
        "values would be scaled, which DeepSeek-V3 does not do",
        OFF,
        "attention_multiplier scale_depth mup_multiplier llama_4_scaling llama_4_scaling_beta attn_temperature_tuning "
        "attn_scale",
    ),
    (ROTARY, ONE, "partial_rotary_factor rotary_pct"),
    (
        ROTARY,
        OFF,
        "rope_local_base_freq use_mla_nope mla_use_nope no_rope_layers no_rope_layer_interval nope_layer_interval",
    ),
    ("layers would not be as first_k_dense_replace says", ONE, "interleave_moe_layer_step decoder_sparse_step"),
    ("layers would not be as first_k_dense_replace says", OFF, "mlp_only_layers moe_layers mlp_layer_types"),
    (
        "the router would be another one",
        (None, "sigmoid"),
        "score_function moe_router_activation_func router_activation",
    ),
    ("the router would be another one", OFF, "num_hash_layers zero_expert_num zero_expert_type"),
    ("experts would have another width", OFF, "routed_expert_hidden_size"),
    ("the residual stream would not be a plain sum", OFF, "farskip hc_mult mhc o_groups o_lora_rank engram_layer_ids"),
    ("the weights would be compressed", OFF, "compression_config"),
    ("the model would have parts besides its language model", OFF, "text_config vision_config"),
)
"""Effect, the values with which there is none, and the keys. A list is judged by its items."""

Changes = dict[str, tuple[str, tuple[Any, ...]]]
CHANGES: Changes = {key: (effect, neutral) for effect, neutral, keys in EFFECTS for key in keys.split()}
IN_ROTARY: Changes = {
    **dict.fromkeys(("partial_rotary_factor", "attn_factor", "extrapolation_factor"), (ROTARY, ONE)),
    **dict.fromkeys(("short_factor", "long_factor", "low_freq_factor", "high_freq_factor"), (ROTARY, OFF)),
    "llama_4_scaling_beta": CHANGES["llama_4_scaling_beta"],
}
"""The same for keys of `rope_scaling` and `rope_parameters`."""
SIZED = ("num_key_value_heads", "head_dim", "qk_head_dim", "rotary_dim")
"""Keys that must be what other keys say."""
SHOWN, SIMILAR, MOST = 60, 0.85, 8


@dataclass(frozen=True)
class Sized:
    """A key that repeats what others say, and the value that they give it."""

    key: str
    value: int
    why: str


def changed(config: dict[str, Any], table: Changes = CHANGES) -> Iterator[str]:
    """For each key of `config` that would make it another model, `KEY: VALUE: what it would do`."""
    for key, (effect, neutral) in table.items():
        if key in config and not _is_one_of(config[key], neutral):
            yield f"{key}: {shown(config[key])}: {effect}"


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value in neutral or (isinstance(value, list) and all(item in neutral for item in value))


def repeated(config: dict[str, Any], sizes: Iterable[Sized]) -> Iterator[str]:
    """For each of `sizes` that `config` contradicts, how."""
    for said in sizes:
        given = config.get(said.key)
        if given is not None and (type(given) is bool or given != said.value):
            yield f"{said.key}: {shown(given)} is not {said.value}: {said.why}"


def with_names(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the keys that it has under their second names. Raises ValueError if the two differ."""
    named = dict(config)
    for alias, key in ALIASES.items():
        if alias in named and named.setdefault(key, named[alias]) != named[alias]:
            raise ValueError(f"{alias}: {shown(named[alias])} beside {key}: {shown(named[key])}, which is the same")
    return named


def unread(config: dict[str, Any], read: Iterable[str], beside: Iterable[str] = ()) -> str:
    """Keys of `config` that are neither `read` nor known, and those `beside`, with keys that they may stand for."""
    meaningful = sorted({*read, *ALIASES})
    known = {*meaningful, *CHANGES, *INERT, *SIZED}
    keys = [*(key for key in config if key not in known), *beside]
    more = f" and {len(keys) - MOST} more" if len(keys) > MOST else ""
    return ", ".join(_named(key, meaningful if key in config else []) for key in keys[:MOST]) + more


def _named(key: str, known: list[str]) -> str:
    similar = nearest(key, known, SIMILAR)
    return cut(key, SHOWN) + (f" (did you mean {similar}?)" if similar else "")
