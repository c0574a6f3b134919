"""Run: the text after prompts, from the ONNX graph of an output or from its fx graph on CPU."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fxquant.evaluation.verbs import open_output
from fxquant.generation.completion import Piece
from fxquant.generation.generator import TextGenerator
from fxquant.generation.options import GenerateOptions
from fxquant.generation.prompts import text_prompt


def open_generator(out: str | Path, options: GenerateOptions | None = None) -> TextGenerator:
    """A generator of text from `out`: by ONNX Runtime if it has an ONNX graph, else by its fx graph.

    Raises FxquantError for a generation_config.json that asks for more than is supported.
    """
    folder = Path(out)
    return TextGenerator(folder, *open_output(folder), options or GenerateOptions())


def run(
    out: str | Path, prompt: str, max_new_tokens: int | None = None, options: GenerateOptions | None = None
) -> Iterator[str]:
    """Text after `prompt`, piece by piece, sampled as generation_config.json says unless `options` overrule it.

    Raises FxquantError at once for a prompt that has no tokens or is too long for the model.
    """
    options = options or GenerateOptions()
    if max_new_tokens is not None:
        options = replace(options, max_new_tokens=max_new_tokens)
    checked = text_prompt(prompt)
    generator = open_generator(out, options)
    encoded = generator.encode([checked])
    return (event.text for event in generator.write(encoded) if isinstance(event, Piece))
