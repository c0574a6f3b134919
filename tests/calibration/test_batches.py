"""Documents that run together: what is padded, and that padding counts in nothing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from test_calibrate import STATIC_LINEARS
from tiny import float_program, load_model, meta_model, random_ids
from torch import Tensor
from typer.testing import CliRunner

from fxquant import CompileOptions, compile
from fxquant.calibration.batches import Batch, batched, real_tokens
from fxquant.calibration.calibration_file import Calibration, load_calibration, text_hash
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.passes import AssignSchemes, Calibrate
from fxquant.policy.policy import load_policy
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.text.load import pad_id
from fxquant.tools.compile_report import as_document, print_report, unseen_line
from fxquant.tools.main import app

LENGTHS = (12, 7, 1, 9, 5)
GATE = "model.layers.1.mlp.gate"


@pytest.fixture(scope="module")
def documents(checkpoint: Checkpoint) -> list[Tensor]:
    return [random_ids(meta_model(checkpoint), 1, length, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def calibrated(checkpoint: Checkpoint, documents: list[Tensor]) -> Callable[..., Calibration]:
    """`calibrated(4, pad=3)`: what calibration in batches of four saw."""

    def calibrate(size: int, pad: int = 0) -> Calibration:
        policy, program = load_policy("deepseek_w4a8"), float_program(checkpoint)
        AssignSchemes(policy)(program)
        calibration_pass = Calibrate(policy, checkpoint, lambda: documents, batch_size=size, pad=pad)
        calibration_pass(program)
        assert calibration_pass.used is not None
        return calibration_pass.used

    return calibrate


# batches


def test_shorter_documents_are_filled_up_on_the_right() -> None:
    first, second = batched([torch.tensor([[1, 2, 3]]), torch.tensor([[4]]), torch.tensor([[5, 6]])], 2, 9)
    assert (first.ids.tolist(), first.mask.tolist()) == ([[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]])
    assert (second.ids.tolist(), second.mask.tolist()) == ([[5, 6]], [[1, 1]])
    assert (first.tokens, second.tokens) == (4, 2)
    assert all(tensor.dtype is torch.int64 for batch in (first, second) for tensor in (batch.ids, batch.mask))


def test_real_tokens_are_those_of_the_mask() -> None:
    value, mask = torch.arange(12).view(2, 3, 2), torch.tensor([[1, 1, 1], [1, 0, 0]])
    expected = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert real_tokens(value, mask).tolist() == real_tokens(value.view(6, 2), mask).tolist() == expected
    assert real_tokens(value, torch.ones_like(mask)).tolist() == value.view(6, 2).tolist()


def test_rows_that_are_no_positions_are_refused_with_padding_only() -> None:
    last, mask = torch.zeros(2, 1, 4), torch.tensor([[1, 1], [1, 0]])
    assert real_tokens(last, torch.ones_like(mask)).shape == (2, 4)
    with pytest.raises(FxquantError, match="2 input rows for 4 positions") as caught:
        real_tokens(last, mask)
    assert caught.value.remedy == "Use --batch-size 1."


@pytest.mark.parametrize(("config", "expected"), [(5, 5), (None, 0), (-1, 0), (128, 0), ("<pad>", 0)])
def test_pad_id_is_one_of_the_vocabulary(config: object, expected: int) -> None:
    assert pad_id(Checkpoint(Path(), {"vocab_size": 128, "pad_token_id": config}, {})) == expected
    assert pad_id(Checkpoint(Path(), {"vocab_size": 128}, {})) == 0


def test_the_hash_of_a_text_covers_the_mask_and_no_padding() -> None:
    ids, whole, cut = torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 1]]), torch.tensor([[1, 1, 0]])
    assert text_hash([Batch(ids, whole)]) != text_hash([Batch(ids, cut)])
    assert text_hash([Batch(ids, cut)]) == text_hash([Batch(torch.tensor([[1, 2, 7]]), cut)])
    assert text_hash([Batch(ids, cut)]) != text_hash([Batch(torch.tensor([[1, 3, 0]]), cut)])


# the forward


def test_padding_moves_no_logit(checkpoint: Checkpoint, documents: list[Tensor]) -> None:
    program = float_program(checkpoint)
    alone = [output[0] for output in execute(program, checkpoint.read, [prefill_inputs(program, d) for d in documents])]
    (batch,) = batched(documents, len(documents), 3)
    ((together, *_),) = execute(program, checkpoint.read, [prefill_inputs(program, batch.ids, mask=batch.mask)])
    for row, (logits,) in zip(together, alone, strict=True):
        # sums over hidden features and keys in another order, 2**-24 each
        assert (row[: len(logits)] - logits).abs().max() <= 256 * 2.0**-24 * logits.abs().max()


# statistics


def extremes(calibration: Calibration) -> dict[str, tuple[float, float]]:
    return {module: (low.min().item(), high.max().item()) for module, (low, high) in calibration.ranges.items()}


def test_batches_see_what_single_documents_see(calibrated: Callable[..., Calibration]) -> None:
    alone, together = calibrated(1), calibrated(4, pad=3)
    assert alone.tokens.tolist() == list(LENGTHS) and together.tokens.tolist() == [sum(LENGTHS[:4]), LENGTHS[4]]
    assert alone.seen.text != together.seen.text
    for module, seen in extremes(together).items():
        expected = extremes(alone)[module]
        if module in STATIC_LINEARS[:2]:  # read the first norm: each row by itself, nothing summed in another order
            assert seen == expected
        # attention sums over padded keys, and matrix products over blocks that depend on the number of rows: each of
        # 256 terms may be off by 2**-24 of the largest
        bound = 256 * 2.0**-24 * max(abs(value) for value in expected)
        assert all(abs(a - b) <= bound for a, b in zip(seen, expected, strict=True)), module
    # integers: no score of a random router is so near another that noise would swap them
    assert torch.equal(alone.experts[GATE], together.experts[GATE])


@pytest.mark.parametrize("size", [2, 5])
def test_the_id_of_padding_changes_nothing(size: int, calibrated: Callable[..., Calibration]) -> None:
    zero, other = calibrated(size, pad=0), calibrated(size, pad=101)
    assert zero.seen == other.seen and torch.equal(zero.tokens, other.tokens)
    for module, pair in zero.ranges.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, other.ranges[module], strict=True)), module
    assert torch.equal(zero.experts[GATE], other.experts[GATE])


def test_a_mean_over_batches_is_one_of_so_many_values(calibrated: Callable[..., Calibration]) -> None:
    """What `batch_mean` takes the mean of: the extremes of each batch over all its documents."""
    alone, together = calibrated(1), calibrated(2)
    low, high = alone.ranges[STATIC_LINEARS[0]]
    pairs = [slice(0, 2), slice(2, 4), slice(4, 5)]
    span = together.ranges[STATIC_LINEARS[0]]
    assert span[0].tolist() == [low[pair].min().item() for pair in pairs]
    assert span[1].tolist() == [high[pair].max().item() for pair in pairs]


# experts


def test_experts_are_counted_as_the_eager_router_chooses(
    checkpoint: Checkpoint, documents: list[Tensor], calibrated: Callable[..., Calibration]
) -> None:
    model, routed = load_model(checkpoint), []
    gate = model.get_submodule(GATE)
    gate.register_forward_hook(lambda module, args, output: routed.append(output[0].flatten()))
    program = float_program(checkpoint)
    with torch.no_grad():
        for ids in documents:
            inputs = prefill_inputs(program, ids)
            model(*inputs[:3], list(inputs[3:]))
    assert list(calibrated(1).experts) == [GATE]
    assert torch.equal(calibrated(4, pad=3).experts[GATE], torch.bincount(torch.cat(routed), minlength=8))


def test_batch_size_is_an_option_and_the_report_counts_experts(
    tiny_folder: Callable[..., Path], documents: list[Tensor], tmp_path: Path
) -> None:
    folder, lines = tiny_folder(), [str(ids[0].tolist()) for ids in documents]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    options = CompileOptions(
        policy="deepseek_w4a8", out=tmp_path / "out", calib=tmp_path / "text.jsonl", samples=3, batch_size=2
    )
    report = compile(folder, options)
    saved = load_calibration(tmp_path / "out" / "optional" / "calibration.safetensors")
    assert saved.tokens.tolist() == [19, 1]
    counts = as_document(report)["expert_tokens"]
    assert counts == {GATE: saved.experts[GATE].tolist()} and sum(counts[GATE]) == 2 * 20
    report.calibration = replace(saved, experts={GATE: torch.tensor([0, *[5] * 7])})
    print_report(report, console := Console(record=True, width=200, file=StringIO()))
    assert f"1 of 8 experts saw no token of the calibration text ({GATE}: 0)\n" in console.export_text()


def test_the_command_line_says_how_much_text(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[CompileOptions] = []
    monkeypatch.setattr("fxquant.api.compile", lambda model, options, report: given.append(options) or 1 / 0)
    command = ["compile", "model", "--samples", "3", "--seq-len", "8", "--batch-size", "2"]
    assert isinstance(CliRunner().invoke(app, command).exception, ZeroDivisionError)
    assert (given[0].samples, given[0].seq_len, given[0].batch_size) == (3, 8, 2)


def report_of(counts: dict[str, Sequence[int]]) -> SimpleNamespace:
    experts = {module: torch.tensor(seen) for module, seen in counts.items()}
    return SimpleNamespace(calibration=SimpleNamespace(experts=experts))


def test_experts_without_tokens_are_named() -> None:
    assert unseen_line(report_of({"a": [1, 2], "b": [3, 4]})) == ""
    assert unseen_line(SimpleNamespace(calibration=None)) == ""
    line = unseen_line(report_of({"a": [0, 2, 0], "b": [3, 4, 0]}))
    assert line == "3 of 6 experts saw no token of the calibration text (a: 0, a: 2, b: 2)"
    assert unseen_line(report_of({"a": [0] * 9})).endswith("(a: 0, a: 1, a: 2, a: 3, …)")
