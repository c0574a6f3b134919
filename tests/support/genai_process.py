"""A process that generates with onnxruntime-genai: python genai_process.py FOLDER STEPS, prompts as JSON on stdin.

A prompt is a text or token ids. The last line on stdout is JSON: the package's version, the ids of the prompts, and
the tokens that follow each.
"""

import json
import sys

import onnxruntime_genai as genai


def main() -> None:
    """Greedy, one prompt at a time."""
    folder, steps = sys.argv[1], int(sys.argv[2])
    model = genai.Model(folder)
    tokenizer = genai.Tokenizer(model)
    prompts = [
        [int(token) for token in tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        for prompt in json.load(sys.stdin)
    ]
    tokens = [generated(model, prompt, steps) for prompt in prompts] if steps else []
    print(json.dumps({"version": genai.__version__, "prompts": prompts, "tokens": tokens}))


def generated(model: "genai.Model", prompt: list[int], steps: int) -> list[int]:
    params = genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + steps)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


if __name__ == "__main__":
    main()
