"""Intervals over documents, and the figures they belong to, against loops."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.evaluation.bootstrap import draw_documents, drawn_percentile, middle
from fxquant.evaluation.divergence import Evaluation, summary, token_scores
from fxquant.tools.figures import difference
from fxquant.tools.main import run

NAMES = {"float_perplexity", "quantized_perplexity", "perplexity_ratio", "kl_mean", "kl_p99", "top1_agreement"}


def documents(lengths: list[int], seed: int = 0) -> list[Tensor]:
    """Scores of so many tokens each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(4, length, generator=generator, dtype=torch.float64) for length in lengths]


def test_draws_are_the_same_and_have_every_size() -> None:
    counts = draw_documents(7)
    assert torch.equal(counts, draw_documents(7)) and counts.shape == (1000, 7)
    assert (counts.sum(1) == 7).all() and counts.min() == 0 and counts.max() > 1


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3)), min_size=1, max_size=30), st.integers(1, 100))
def test_percentile_of_a_draw_is_that_of_repeated_values(tokens: list[tuple[int, int]], percent: int) -> None:
    values = torch.tensor([float(value) for value, _ in tokens])
    owners = torch.tensor([owner for _, owner in tokens])
    counts = torch.tensor([[1.0, 1, 1, 1], [2, 0, 1, 1], [0, 3, 0, 1]], dtype=torch.float64)
    for draw in counts:
        repeated = sorted(v for value, owner in zip(values, owners, strict=True) for v in [value] * int(draw[owner]))
        if not repeated:
            continue
        needed = -(-percent * len(repeated) // 100)  # rounded up
        assert drawn_percentile(values, owners, draw[None], percent).item() == repeated[needed - 1]


def test_figures_are_means_over_tokens_not_over_documents() -> None:
    scores = documents([30, 500, 70])
    result, tokens = summary(scores), torch.cat(scores, 1)
    assert result.tokens == 600 and result.documents == 3 and result.intervals.keys() == NAMES
    assert math.isclose(result.float_perplexity, math.exp(tokens[0].mean()))
    assert math.isclose(result.quantized_perplexity, math.exp(tokens[1].mean()))
    assert math.isclose(result.perplexity_ratio, result.quantized_perplexity / result.float_perplexity)
    assert math.isclose(result.kl_mean, tokens[2].mean()) and math.isclose(result.top1_agreement, tokens[3].mean())
    assert result.kl_p99 == tokens[2].sort().values[593]  # 99 % of 600 is 594: the 594th


def test_intervals_hold_the_figure_and_shrink_with_text() -> None:
    def width(result: Evaluation, name: str) -> float:
        low, high = result.intervals[name]
        assert low <= getattr(result, name) <= high
        return high - low

    few, many = summary(documents([64] * 8)), summary(documents([64] * 128))
    assert all(width(many, name) < width(few, name) for name in NAMES - {"kl_p99"})


def test_one_document_has_no_interval() -> None:
    assert summary(documents([9])).intervals == {}


def test_a_difference_is_paired() -> None:
    """What a document costs both programs cancels: its interval is far narrower than those of the two."""
    first = documents([64] * 40)
    for number, document in enumerate(first):
        document[2] += number % 5
    second = [document.clone() for document in first]
    for document in second:
        document[2] += 0.01 * torch.rand(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alone, paired = summary(second), summary(second, first)
    more = torch.cat(second, 1)[2] - torch.cat(first, 1)[2]
    assert paired.kl_difference is not None and math.isclose(paired.kl_difference, more.mean(), rel_tol=1e-9)
    low, high = paired.intervals["kl_difference"]
    assert 0 < low <= paired.kl_difference <= high and high - low < 0.01
    assert alone.kl_difference is None and alone.intervals == {name: paired.intervals[name] for name in NAMES}
    assert difference(paired) == (f"{paired.kl_difference:+.5f}", f"{low:+.5f} to {high:+.5f}", "more")
    assert difference(summary(first, second))[2] == "less"


def test_no_difference_is_not_distinguishable_and_one_document_has_no_interval() -> None:
    scores = documents([9, 8, 7])
    assert difference(summary(scores, scores)) == ("+0.00000", "+0.00000 to +0.00000", "not distinguishable")
    assert difference(summary(scores[:1], scores[:1])) == ("+0.00000", "", "")


def test_the_interval_covers_as_often_as_it_says() -> None:
    """300 texts of 60 documents with mean 0.5: 95 % of the intervals hold it, here within four standard errors."""
    held = 0
    for seed in range(300):
        means = torch.rand(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        low, high = middle(draw_documents(60) @ means / 60)
        held += low <= 0.5 <= high
    assert abs(held / 300 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 300)


def test_scores_of_tokens_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(1, 5, 11, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    ids = torch.randint(0, 11, (1, 6), generator=generator)
    scores = token_scores(ids, p, q)
    for t in range(5):
        divergence = sum(math.exp(a) * (a - b) for a, b in zip(p[0, t].tolist(), q[0, t].tolist(), strict=True))
        expected = [-p[0, t, ids[0, t + 1]].item(), -q[0, t, ids[0, t + 1]].item(), divergence]
        assert scores[:3, t].tolist() == pytest.approx(expected, rel=1e-12)  # sums of eleven float64 terms
        assert scores[3, t] == (p[0, t].argmax() == q[0, t].argmax())


@pytest.mark.parametrize("lengths", [[5], [5, 6, 7]])
def test_the_command_shows_them(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = summary(documents(lengths))
    monkeypatch.setattr("fxquant.api.evaluate", lambda *arguments: result)
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["fxquant", "eval", "out", "--text", "some.txt", *more])
        with pytest.raises(SystemExit) as stop:
            run()
        assert stop.value.code == 0
        text = capsys.readouterr().out
        if more:
            document = json.loads(text)
            assert document["kl_mean"] == result.kl_mean and document["intervals"].keys() == result.intervals.keys()
        else:
            assert f"{result.kl_mean:.5f}" in text and ("95 %" in text) == (len(lengths) > 1)
