"""Released onnxruntime-genai generates what our own session does, from the folder as it is written."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from genai import VERSION, encoded, greedy, run_with_it
from places import EXAMPLE, ROOT

from fxquant import CompileOptions, compile, convert
from fxquant.compilation.onnx_options import OnnxOptions
from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.engines.table import Target
from fxquant.generation.greedy import greedy as decode
from fxquant.lowering.onnx.runner import OnnxRunner
from fxquant.text.tokenizer import open_tokenizer

PROMPTS, STEPS, LENGTH, BOS, END, VOCABULARY = 20, 128, 24, 0, 1, 2048
pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[OnnxProfile], Path]:
    """The example with its cache in halves, of each profile."""
    base = tmp_path_factory.mktemp("genai")
    options = CompileOptions(target=Target.ONNX, out=base / "qdq", onnx_cache=OnnxCache.HALVES, verify=False)
    qdq = compile(EXAMPLE, options).out

    @cache
    def make(profile: OnnxProfile) -> Path:
        if profile is OnnxProfile.QDQ:
            return qdq
        into = base / profile
        convert(
            qdq, Target.ONNX, into, verify=False, onnx=OnnxOptions(onnx_profile=profile, onnx_cache=OnnxCache.HALVES)
        )
        return into

    return make


def texts() -> list[str]:
    lines = (EXAMPLE / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[:PROMPTS]]


def ours(runner: OnnxRunner, prompt: list[int]) -> list[int]:
    """Greedy tokens until the end token, which is one of them."""
    tokens: list[int] = []
    for logits in decode(runner, [prompt], STEPS, VOCABULARY):
        tokens.append(int(logits[0].argmax()))
        if tokens[-1] == END:
            break
    return tokens


@pytest.mark.parametrize("profile", OnnxProfile)
def test_greedy_tokens_are_ours(folder: Callable[[OnnxProfile], Path], profile: OnnxProfile) -> None:
    tokenizer = open_tokenizer(EXAMPLE)
    prompts = [[BOS, *tokenizer.encode(text)[:LENGTH]] for text in texts()]
    assert len(prompts) == PROMPTS
    answer = greedy(folder(profile), prompts, STEPS)
    assert answer["version"] == VERSION, answer
    runner = OnnxRunner(folder(profile))
    for prompt, tokens in zip(prompts, answer["tokens"], strict=True):
        assert tokens == ours(runner, prompt)


def test_the_script_of_the_documents(folder: Callable[[OnnxProfile], Path], tmp_path: Path) -> None:
    (script,) = re.findall(r'```python title="genai.py"\n(.*?)```', (ROOT / "docs" / "onnx.md").read_text(), re.DOTALL)
    (tmp_path / "genai.py").write_text(script)
    done = run_with_it([str(tmp_path / "genai.py"), str(folder(OnnxProfile.QDQ)), "The engine reads"])
    tokenizer, runner = open_tokenizer(EXAMPLE), OnnxRunner(folder(OnnxProfile.QDQ))
    logits = decode(runner, [[BOS, *tokenizer.encode("The engine reads")]], 20, VOCABULARY)
    assert done.stdout == tokenizer.decode([int(one[0].argmax()) for one in logits]) + "\n", done.stderr


def test_its_tokenizer_gives_the_same_ids_and_no_bos(folder: Callable[[OnnxProfile], Path]) -> None:
    tokenizer = open_tokenizer(EXAMPLE)
    assert encoded(folder(OnnxProfile.QDQ), texts()) == [tokenizer.encode(text) for text in texts()]
