"""Every way in which writer and engine could disagree on bytes shows: in the integers, the results, or on one rank."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from reader_folders import EXPERTS, Draft
from slowness import others_slow
from test_reader_experts import PROJECTIONS, WIDTH, draft_for, load, miss, random_input
from torch import Tensor

from fxquant.engine_readers import Arithmetic

Tensors = dict[str, Tensor]
PACKED = pytest.mark.parametrize("engine", ["vllm-ascend", "vllm-ascend-per-group"])
GATE, UP, DOWN = (f"{EXPERTS}.1.{name}" for name in PROJECTIONS)


@cache
def whole(engine: str) -> Draft:
    return draft_for(engine)


def spoiled(engine: str, folder: Path, change: Callable[[Tensors], None]) -> tuple[Draft, Path]:
    draft = replace(whole(engine), tensors={name: tensor.clone() for name, tensor in whole(engine).tensors.items()})
    change(draft.tensors)
    return draft, draft.write(folder)


def swap_nibbles(tensors: Tensors) -> None:
    weight = tensors[f"{DOWN}.weight"]
    tensors[f"{DOWN}.weight"] = (weight << 4) | (weight >> 4 & 15)


def swap_gate_and_up(tensors: Tensors) -> None:
    tensors[f"{GATE}.weight"], tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"], tensors[f"{GATE}.weight"]


def reorder_bytes(tensors: Tensors) -> None:
    """Bytes in the order of the transposed weight, in the shape of the other."""
    weight = tensors[f"{DOWN}.weight"]
    tensors[f"{DOWN}.weight"] = weight.T.contiguous().view(weight.shape)


def pair_along_k(tensors: Tensors) -> None:
    """Two consecutive k in a byte, in place of two consecutive n."""
    weight = tensors[f"{DOWN}.weight"]
    low, high = weight & 15, weight >> 4 & 15
    rows = torch.stack((low, high), 1).flatten(0, 1)
    tensors[f"{DOWN}.weight"] = (rows[:, ::2] | rows[:, 1::2] << 4).view(weight.shape)


@PACKED
@pytest.mark.parametrize("change", [swap_nibbles, swap_gate_and_up, reorder_bytes, pair_along_k])
def test_wrong_weights_show_in_the_integers(tmp_path: Path, engine: str, change: Callable[[Tensors], None]) -> None:
    draft, folder = spoiled(engine, tmp_path, change)
    projection = "gate_proj" if change is swap_gate_and_up else "down_proj"
    codes = load(engine, folder, projection).codes()
    assert not torch.equal(codes.long(), draft.truths[f"{EXPERTS}.1.{projection}"].codes)


def drop(suffix: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{DOWN}.{suffix}": torch.zeros_like(tensors[f"{DOWN}.{suffix}"])})


def negate(tensors: Tensors) -> None:
    tensors[f"{DOWN}.scale_bias"] *= -1


def forget_the_eight(tensors: Tensors) -> None:
    tensors[f"{DOWN}.scale_bias"] /= 8


def one_value(tensors: Tensors) -> None:
    """The largest of 16 columns, so that its row's sum moves by more than the rounding of scales."""
    bias = tensors[f"{DOWN}.scale_bias"]
    row, column = divmod(int(bias.abs().argmax()), 16)
    bias[row, column] = 0


def swap_rows(tensors: Tensors) -> None:
    tensors[f"{DOWN}.scale_bias"] = tensors[f"{DOWN}.scale_bias"].roll(1, 0)


@PACKED
@pytest.mark.parametrize("change", others_slow([negate, forget_the_eight, one_value, swap_rows], [one_value]))
def test_a_wrong_scale_bias_shows_in_the_result(tmp_path: Path, engine: str, change: Callable[[Tensors], None]) -> None:
    draft, folder = spoiled(engine, tmp_path, change)
    for ranks in (1, 4):
        loaded = load(engine, folder, "down_proj", ranks)
        assert torch.equal(loaded.codes().long(), draft.truths[DOWN].codes)
        assert miss(loaded, draft, "down_proj") > 1


@PACKED
def test_columns_of_another_rank_show_on_the_rank(tmp_path: Path, engine: str) -> None:
    """The ranks' sum is right, which is what hides it on a device where all rows have one scale."""

    def roll(tensors: Tensors) -> None:
        tensors[f"{DOWN}.scale_bias"] = tensors[f"{DOWN}.scale_bias"].roll(1, 1)

    draft, folder = spoiled(engine, tmp_path, roll)
    loaded, x = load(engine, folder, "down_proj", 16), random_input("down_proj")
    assert miss(loaded, draft, "down_proj") <= 1
    x8, x_scale = loaded.quantize(x, Arithmetic.EXACT)
    truth, partials, bounds = draft.truths[DOWN], loaded.partials(x, Arithmetic.EXACT), loaded.partial_bounds(x)
    run = WIDTH // 16
    for rank in range(16):
        part = slice(rank * run, (rank + 1) * run)
        ideal = (x8[:, part].double() @ truth.codes[:, part].double().T) * truth.scale * x_scale.double()
        assert ((partials[rank] - ideal).abs() > bounds[rank]).any(), rank


@PACKED
def test_a_wrong_scale_shows_in_the_result(tmp_path: Path, engine: str) -> None:
    """One channel's scale off by one part in 128; what float16 costs is one in 2048."""

    def widen(tensors: Tensors) -> None:
        tensors[f"{GATE}.weight_scale"][5] *= 1 + 2.0**-7

    draft, folder = spoiled(engine, tmp_path, widen)
    loaded = load(engine, folder, "gate_proj")
    draft_miss = miss(loaded, draft, "gate_proj")
    assert draft_miss > 1
    assert torch.equal(loaded.codes().long(), draft.truths[GATE].codes)


def test_a_wrong_group_scale_shows_in_the_integers(tmp_path: Path) -> None:
    def shift(tensors: Tensors) -> None:
        tensors[f"{DOWN}.weight_scale_second"] = tensors[f"{DOWN}.weight_scale_second"].roll(1, 1)

    for engine in ("vllm-ascend-per-group", "mindie", "mindie-2.1rc1"):
        draft, folder = spoiled(engine, tmp_path / engine, shift)
        assert not torch.equal(load(engine, folder, "down_proj").codes().long(), draft.truths[DOWN].codes)


def test_values_beyond_int4_show_where_they_are_not_packed(tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> None:
        tensors[f"{DOWN}.weight"][3, 7] = 8

    _, folder = spoiled("mindie-2.1rc1", tmp_path, widen)
    with pytest.raises(Exception, match=r"down_proj.weight: holds -8 … 8, int4 is -8 … 7"):
        load("mindie-2.1rc1", folder, "down_proj")
