"""genai_config.json: how onnxruntime-genai runs a model.onnx whose cache is in halves."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxquant.errors import FxquantError
from fxquant.inputs.json_file import read_json
from fxquant.inputs.limits import CONFIG_BYTES
from fxquant.inputs.validation import validation_fact
from fxquant.lowering.onnx.writer import FILE as MODEL
from fxquant.program.program import Program
from fxquant.runtime.execute import cache_inputs

GENERATION = "generation_config.json"
TOKENS = ("input_ids", "attention_mask", "position_ids")
SESSION = {"session.x64quantprecision": "1"}
"""Exact products on x86 without VNNI too; the file is the same wherever it is written."""
WAY_OUT = "Change the file, or pass --onnx-cache latent, which writes no genai_config.json."
Token = Annotated[int, Field(ge=0)]


class _Generation(BaseModel):
    """What is taken of generation_config.json."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | None = None


def genai_config(program: Program, folder: Path) -> dict[str, Any]:
    """The document. `program` is the stored one; `folder` has the generation_config.json whose sampling is taken.

    Raises FxquantError if that file says what is no sampling.
    """
    generation = _generation(folder / GENERATION)
    return {"model": _model(program, generation), "search": _search(program, generation)}


def _generation(file: Path) -> _Generation:
    document = read_json(file, CONFIG_BYTES, WAY_OUT, lenient=True) if file.is_file() else {}
    try:
        return _Generation.model_validate(document)
    except ValidationError as error:
        raise FxquantError(file, validation_fact(error, _Generation, document), WAY_OUT) from None


def _model(program: Program, generation: _Generation) -> dict[str, Any]:
    config = program.config
    end = config.get("eos_token_id") if generation.eos_token_id is None else generation.eos_token_id
    ends = [token for token in (end if isinstance(end, list) else [end]) if isinstance(token, int)]
    pad = config.get("pad_token_id") if generation.pad_token_id is None else generation.pad_token_id
    tokens = {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": ends or None,
        # what pads a batch has no effect: attention_mask hides it
        "pad_token_id": pad if isinstance(pad, int) else next(iter(ends), None),
    }
    sizes = {"vocab_size": _vocabulary(program), "context_length": config["max_position_embeddings"]}
    known = {name: token for name, token in tokens.items() if token is not None}
    return {"type": "decoder", **known, **sizes, "decoder": _decoder(program)}


def _decoder(program: Program) -> dict[str, Any]:
    caches = cache_inputs(program)
    kinds = ("key", "value")
    return {
        "filename": MODEL,
        "session_options": SESSION | {"provider_options": []},
        "hidden_size": program.config["hidden_size"],
        "num_attention_heads": program.config["num_attention_heads"],
        "num_hidden_layers": len(caches),
        "num_key_value_heads": 1,
        "head_size": int(caches[0].meta["val"].shape[-1]) // 2,
        "inputs": {name: name for name in TOKENS}
        | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in kinds},
        "outputs": {"logits": "logits"} | {f"present_{kind}_names": f"present.%d.{kind}" for kind in kinds},
    }


def _search(program: Program, generation: _Generation) -> dict[str, Any]:
    """As `fxquant run` samples. What is left out would be chosen by onnxruntime-genai, such as the best 50 tokens."""
    best = max(generation.top_k or 0, 0)
    return {
        "do_sample": bool(generation.do_sample),
        "temperature": _or_one(generation.temperature),
        "top_k": best if best < _vocabulary(program) else 0,
        "top_p": _or_one(generation.top_p),
        "repetition_penalty": _or_one(generation.repetition_penalty),
        "max_length": program.config["max_position_embeddings"],
        "past_present_share_buffer": False,
    }


def _or_one(number: float | None) -> float:
    return 1.0 if number is None else float(number)


def _vocabulary(program: Program) -> int:
    return int(program.graph.results[0].meta["val"].shape[-1])
