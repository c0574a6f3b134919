"""Sampling: the scores of transformers' processors in its order, and draws that only a seed and a text decide."""

import math

import pytest
import torch
from torch import Tensor

from fxquant.errors import FxquantError
from fxquant.generation.sampling import Sampler, Sampling, penalized, warped

processors = pytest.importorskip("transformers.generation.logits_process")
VOCABULARY = 300


def random_logits(seed: int, ties: bool = False) -> Tensor:
    """Spread as a model's are; rounded to tenths many are equal."""
    scores = 4 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return (10 * scores).round() / 10 if ties else scores


def of_transformers(scores: Tensor, sampling: Sampling) -> Tensor:
    """Its processors in the order of GenerationMixin."""
    chain = [processors.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        chain.append(processors.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(processors.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(processors.MinPLogitsWarper(sampling.min_p))
    return processors.LogitsProcessorList(chain)(torch.zeros(1, 0, dtype=torch.int64), scores[None])[0]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.6, top_p=0.95),
        Sampling(1.0, top_k=7),
        Sampling(0.3, top_k=1),
        Sampling(2.0, top_k=10**6, top_p=0.5),
        Sampling(1.5, top_k=40, top_p=0.9, min_p=0.05),
        Sampling(1.0, top_p=1e-9),
        Sampling(0.7, top_p=0.0),
        Sampling(5.0, min_p=0.2),
        Sampling(1.0, min_p=1.0),
    ],
    ids=str,
)
def test_scores_are_those_of_transformers(sampling: Sampling, ties: bool) -> None:
    for seed in range(20):
        scores = random_logits(seed, ties)
        assert torch.equal(warped(scores, sampling), of_transformers(scores, sampling))


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_penalty_is_that_of_transformers(penalty: float) -> None:
    scores, used = random_logits(1), [3, 3, 7, 299, 0]
    expected = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([used]), scores[None])[0]
    assert torch.equal(penalized(scores, set(used), penalty), expected)


def test_a_penalty_counts_prompt_and_new_tokens_and_the_best_token_too() -> None:
    scores = torch.tensor([4.0, 3.0, 2.5, -1.0])
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0, 17])
    assert [sampler.pick(scores) for _ in range(3)] == [1, 2, 0]


def test_the_best_token_needs_no_seed() -> None:
    scores = random_logits(0, ties=True)
    assert {Sampler(Sampling(seed=seed), []).pick(scores) for seed in range(5)} == {int(scores.argmax())}


def test_a_seed_gives_the_same_tokens_whatever_others_draw() -> None:
    def draws(seed: int, other: Sampler | None = None) -> list[int]:
        sampler, tokens = Sampler(Sampling(1.0, seed=seed), []), []
        for step in range(30):
            if other:
                other.pick(random_logits(step))
            tokens.append(sampler.pick(random_logits(step)))
        return tokens

    torch.manual_seed(5)
    alone = draws(3)
    torch.manual_seed(6)
    assert alone == draws(3, Sampler(Sampling(2.0, seed=9), [])) and alone != draws(4)


def test_draws_have_the_probabilities() -> None:
    """Chi-square of 4,000 draws over 4 tokens: 3 degrees of freedom exceed 25 once in 65,000 times."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    sampler, scores = Sampler(Sampling(1.0), []), torch.full((6,), -math.inf)
    scores[[1, 2, 4, 5]] = probabilities.log().float()
    finite = scores.clamp(min=-1e4)
    counts = torch.tensor([sampler.pick(finite) for _ in range(4000)]).bincount(minlength=6)
    assert counts[0] == counts[3] == 0
    expected = 4000 * probabilities
    assert ((counts[[1, 2, 4, 5]] - expected) ** 2 / expected).sum() < 25


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_the_text(value: float) -> None:
    with pytest.raises(FxquantError, match="not finite"):
        Sampler(Sampling(1.0), []).pick(torch.tensor([0.0, value]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 1.1},
        {"top_p": math.nan}, {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"seed": -1}, {"seed": 1 << 63},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(FxquantError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
