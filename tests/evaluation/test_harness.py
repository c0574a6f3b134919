"""The shipped example under lm-evaluation-harness, on tasks made here; skipped where the harness is not installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from places import EXAMPLE  # noqa: E402

import fxquant  # noqa: E402
from fxquant import CompileOptions, FxquantError  # noqa: E402
from fxquant.evaluation.lm_eval import FxquantLM  # noqa: E402
from fxquant.generation.greedy import greedy  # noqa: E402
from fxquant.runtime.execute import execute, prefill_inputs  # noqa: E402
from fxquant.runtime.program_runner import ProgramRunner  # noqa: E402

TEXTS = [json.loads(line)["text"] for line in (EXAMPLE / "evaluation.jsonl").read_text().splitlines()[:4]]
SPLIT = 160
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "out"
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=folder, verify=False, export=False)
    return fxquant.compile(EXAMPLE, options).out


@pytest.fixture(scope="module")
def model(out: Path) -> FxquantLM:
    return FxquantLM(out, batch_size=4)


def ask(kind: str, *requests: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(requests)]


def log_probabilities(model: FxquantLM, ids: list[int]) -> torch.Tensor:
    """float64 [len(ids), vocabulary]: of the token after each, from one forward over all."""
    ((logits, *_),) = execute(model.program, model.read, [prefill_inputs(model.program, torch.tensor([ids]))])
    return logits[0].double().log_softmax(-1)


def expected(model: FxquantLM, ids: list[int], first: int) -> float:
    """log p of ids[first:]."""
    scores = log_probabilities(model, ids)
    return sum(scores[position - 1, ids[position]].item() for position in range(first, len(ids)))


def test_a_pair_scores_what_the_graph_gives(model: FxquantLM) -> None:
    pairs = [(text[:SPLIT], text[SPLIT:200]) for text in TEXTS] + [("", TEXTS[0][:30])]
    scores = model.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, scores, strict=True):
        before = model.tok_encode(context.rstrip())
        # the harness joins the context's own tokens and what the whole has after so many
        ids = [0, *before, *model.tok_encode(context + continuation)[len(before) :]]
        # here the last position is run too: sums of 256 terms in another order, 2**-24 each, in at most 64 tokens
        assert score == pytest.approx(expected(model, ids, 1 + len(before)), abs=64 * 256 * 2.0**-24)


def test_what_greedy_decoding_gives_is_known_as_such(model: FxquantLM) -> None:
    context = model.tok_encode(TEXTS[1][:SPLIT])
    runner = ProgramRunner(model.program, model.read)
    new = [int(logits.argmax()) for logits in greedy(runner, [[0, *context]], 6, 2048)]
    requests = [(("", ""), context, ids) for ids in (new, new[:1], [new[0], 3, *new[2:]])]
    scores = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in scores] == [True, True, new[1] == 3] and scores[0][0] > scores[2][0]


def test_a_whole_text_is_scored_from_bos_on(model: FxquantLM) -> None:
    scores = model.loglikelihood_rolling(ask("loglikelihood_rolling", (TEXTS[0][:SPLIT],), ("",)), disable_tqdm=True)
    ids = [0, *model.tok_encode(TEXTS[0][:SPLIT])]
    assert scores == [pytest.approx(expected(model, ids, 1), abs=len(ids) * 256 * 2.0**-24), 0]


def test_a_long_text_is_scored_in_windows(out: Path) -> None:
    """Of 16 positions: each token once, in the last window with as much context as fits."""
    model = FxquantLM(out, batch_size=3, max_length=16)
    ids = [0, *model.tok_encode(TEXTS[0])[:40]]
    windows = [(ids[:17], 1), (ids[16:33], 1), (ids[24:41], 9)]
    text = model.encoder.tokenizer.decode(ids[1:])
    assert model.tok_encode(text) == ids[1:]
    (score,) = model.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)), disable_tqdm=True)
    total = sum(expected(model, window, first) for window, first in windows)
    assert score == pytest.approx(total, abs=40 * 256 * 2.0**-24)


def test_generated_text_is_that_of_run(model: FxquantLM, out: Path) -> None:
    whole = "".join(fxquant.run(out, TEXTS[2][:SPLIT], 12, fxquant.GenerateOptions(greedy=True)))
    stop = whole[5:8]
    requests = ({"until": [], "max_gen_toks": 12}, {"until": ["§", stop], "max_gen_toks": 12}, {"until": stop})
    texts = model.generate_until(
        ask("generate_until", *((TEXTS[2][:SPLIT], request) for request in requests)), disable_tqdm=True
    )
    assert texts == [whole, *[whole[: whole.index(stop)]] * 2]


def test_what_cannot_be_done_is_refused(out: Path) -> None:
    model = FxquantLM(out, max_length=16)
    with pytest.raises(FxquantError, match="greedy only"):
        model.generate_until(ask("generate_until", ("a", {"do_sample": True, "temperature": 0.7})))
    with pytest.raises(FxquantError, match="max_gen_toks 16 of 16 positions"):
        model.generate_until(ask("generate_until", ("a", {"max_gen_toks": 16})))
    with pytest.raises(FxquantError, match="16 positions"):
        model.loglikelihood(ask("loglikelihood", ("a", TEXTS[0])))


def test_chats_go_through_the_template_with_one_bos(out: Path, model: FxquantLM) -> None:
    chat: list[dict[str, Any]] = [{"role": "user", "content": "def"}]
    with pytest.raises(FxquantError, match="no chat template"):
        FxquantLM(out).apply_chat_template(chat)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    text = model.apply_chat_template(chat)
    assert text.endswith("def\n> ") and model.apply_chat_template(chat, add_generation_prompt=False).endswith("def\n")
    assert model.tok_encode(text) == model.tok_encode("def\n> ")


# the harness itself


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """`continuations`: which text goes on as the model wrote it; `documents`: perplexity; `words`: generation."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    lines = [
        {"text": text[:240], "start": text[:SPLIT], "choices": [text[SPLIT:200], text[SPLIT:200][::-1]]}
        for text in TEXTS
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    data = {"data_files": {"test": str(tmp_path / "lines.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    choice = {"doc_to_text": "{{start}}", "doc_to_choice": "{{choices}}", "doc_to_target": 0, "target_delimiter": ""}
    document = {"doc_to_text": "", "doc_to_target": "{{text}}"}
    word = {"doc_to_text": "{{start}}", "doc_to_target": "{{text}}"}
    write_task(tmp_path, "continuations", "multiple_choice", "acc", common | choice)
    write_task(tmp_path, "documents", "loglikelihood_rolling", "bits_per_byte", common | document)
    until = {"generation_kwargs": {"until": [" "], "max_gen_toks": 4}}
    write_task(tmp_path, "words", "generate_until", "exact_match", common | word | until)
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def write_task(folder: Path, name: str, kind: str, metric: str, config: dict[str, Any]) -> None:
    """JSON is YAML."""
    task = {"task": name, "output_type": kind, "metric_list": [{"metric": metric}]} | config
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def test_the_harness_evaluates_the_folder(model: FxquantLM, tasks: TaskManager) -> None:
    names = ["continuations", "documents", "words"]
    evaluated = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=tasks, bootstrap_iters=0)
    results = evaluated["results"]
    assert results["continuations"]["acc,none"] == 1  # the model's own text against the same text backwards
    bits = sum(expected(model, [0, *model.tok_encode(text[:240])], 1) for text in TEXTS) / -torch.log(torch.tensor(2.0))
    nbytes = sum(len(text[:240].encode()) for text in TEXTS)
    assert results["documents"]["bits_per_byte,none"] == pytest.approx(bits.item() / nbytes, rel=1e-5)
    options = {"until": [" "], "max_gen_toks": 4}
    words = model.generate_until(ask("generate_until", *((text[:SPLIT], options) for text in TEXTS)), disable_tqdm=True)
    assert [sample["resps"] for sample in evaluated["samples"]["words"]] == [[[word]] for word in words]
