"""generation_config.json: how a checkpoint's authors have its text sampled. Every key is used, refused or named."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxquant.errors import FxquantError
from fxquant.inputs.json_file import read_json
from fxquant.inputs.limits import CONFIG_BYTES
from fxquant.inputs.validation import validation_fact

FILE = "generation_config.json"
IGNORE = "Change the file, or ignore it with --no-generation-config."
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Token = Annotated[int, Field(ge=0)]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "penalty_alpha": (0,),
    "diversity_penalty": (0,), "typical_p": (1,), "top_h": (), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,), "min_new_tokens": (0,), "max_time": (), "bad_words_ids": ([],), "force_words_ids": ([],),
    "constraints": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "sequence_bias": ([], {}), "exponential_decay_length_penalty": (),
    "guidance_scale": (1,), "watermarking_config": ({},), "token_healing": (False,), "dola_layers": (),
}  # fmt: skip
"""Keys that change the text and are not supported → values with which they do not, beside null."""
HARMLESS = frozenset({
    "_from_model_config", "transformers_version", "bos_token_id", "pad_token_id", "decoder_start_token_id",
    "use_cache", "use_mtp", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache",
    "early_stopping", "length_penalty", "renormalize_logits", "remove_invalid_values", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile",
    "continuous_batching_config", "low_memory", "prefill_chunk_size",
})  # fmt: skip
"""Keys that do not change the text of one sequence."""


class GenerationConfig(BaseModel):
    """The keys that are used; None where the file has none."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    max_new_tokens: Count | None = None
    max_length: Count | None = None
    stop_strings: str | list[str] | None = None
    eos_token_id: Token | list[Token] | None = None

    @property
    def end_ids(self) -> set[int] | None:
        """The tokens that end a text; None: those of config.json."""
        stop = self.eos_token_id
        return None if stop is None else set(stop) if isinstance(stop, list) else {stop}

    @property
    def stops(self) -> list[str]:
        """The texts that end a text."""
        words = self.stop_strings or []
        return [words] if isinstance(words, str) else words

    @property
    def unknown(self) -> list[str]:
        """Keys that neither transformers nor we know."""
        return sorted(key for key in self.model_extra or {} if key not in NEUTRAL and key not in HARMLESS)


def read_generation_config(folder: Path) -> GenerationConfig:
    """The folder's file, empty if there is none. Raises FxquantError for a key that changes the text and is not
    supported."""
    file = folder / FILE
    document = read_json(file, CONFIG_BYTES, IGNORE, lenient=True) if file.is_file() else {}
    if not isinstance(document, dict):
        raise FxquantError(file, "not a JSON object.", "Copy the file again.")
    try:
        config = GenerationConfig.model_validate(document)
    except ValidationError as error:
        raise FxquantError(file, validation_fact(error, GenerationConfig, document), IGNORE) from None
    effective = sorted(key for key, value in document.items() if key in NEUTRAL and not _neutral(key, value))
    if effective:
        raise FxquantError(file, f"changes the text by {', '.join(effective)}: not supported.", IGNORE)
    return config


def _neutral(key: str, value: Any) -> bool:
    return value is None or any(value == neutral for neutral in NEUTRAL[key])
