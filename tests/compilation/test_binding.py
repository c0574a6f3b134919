"""Every checkpoint tensor ends in one bucket, and what does not fit the model is refused by name."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import float_program, meta_model, rewritten, write_checkpoint, write_shards
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.compilation.ledger import Bucket, Ledger, build_ledger, check_parameters, mtp_modules
from fxquant.errors import FxquantError
from fxquant.passes import AssignSchemes
from fxquant.policy.policy import MtpMode, load_policy, shipped_policies
from fxquant.program.program import Program

Tiny = Callable[..., Checkpoint]
MTP = {"num_nextn_predict_layers": 1}


def ledger_of(checkpoint: Checkpoint, policy: str) -> Ledger:
    program = rewritten(checkpoint, policy)
    return build_ledger(program, checkpoint)


def mtp_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    return mtp_modules(checkpoint, meta_model(checkpoint).mtp_modules())


def home(name: str) -> tuple[str, str]:
    """Bucket and reason under deepseek_w4a8, from the name of an official tensor of the tiny model with MTP."""
    if name.endswith("_scale_inv"):
        return Bucket.CONSUMED if ".layers.2." not in name else Bucket.LEFT_OUT, name.removesuffix("_scale_inv")
    if ".layers.2." in name:
        return Bucket.LEFT_OUT, "mtp → LEAVE_OUT"
    if "kv_b_proj" in name:
        return Bucket.KEPT, "attention at *.kv_b_proj → FLOAT"
    if re.search(r"self_attn\.\w+_proj(_with_mqa)?\.", name) or "shared_experts" in name:
        return Bucket.REWRITTEN, "W8A8"
    if ".mlp.experts." in name:
        return Bucket.REWRITTEN, "W4A8_DYNAMIC"
    if re.search(r"\.mlp\.\w+_proj\.", name):
        return Bucket.REWRITTEN, "W8A8_DYNAMIC"
    return Bucket.KEPT, "embedding, norm, gate, head → FLOAT"


CHECKPOINTS = {
    "plain": {},
    "sharded": {"shards": 3},
    "fp8": {"fp8": True},
    "mtp": MTP,
    "sharded fp8 with mtp": {"fp8": True, "shards": 2, **MTP},
    "biased": {"attention_bias": True},
}


@pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_every_tensor_is_in_its_bucket(options: dict[str, Any], tiny: Tiny) -> None:
    checkpoint = tiny(**options)
    ledger = ledger_of(checkpoint, "deepseek_w4a8")
    infos = {info.name: info for info in (*checkpoint.tensors.values(), *checkpoint.scales.values())}
    assert [entry.name for entry in ledger.entries] == sorted(infos)
    for entry in ledger.entries:
        bucket, why = home(entry.name)
        left_out_scale = entry.name.endswith("_scale_inv") and bucket is Bucket.LEFT_OUT
        assert (entry.bucket, entry.why) == (bucket, "mtp → LEAVE_OUT" if left_out_scale else why)
        assert entry.nbytes == infos[entry.name].nbytes
    assert sum(entry.nbytes for entry in ledger.entries) == checkpoint.nbytes


@pytest.mark.parametrize("policy", [policy for policy in shipped_policies() if policy != "float"])
@pytest.mark.parametrize("options", [{}, {"fp8": True, **MTP}], ids=["plain", "fp8 with mtp"])
def test_totals_sum_to_the_checkpoint(policy: str, options: dict[str, Any], tiny: Tiny) -> None:
    """Of the float graph with recipes, as a plan sees it."""
    checkpoint, program = tiny(**options), float_program(tiny(**options))
    AssignSchemes(load_policy(policy).with_mtp(MtpMode.NONE), mtp_of(checkpoint))(program)
    totals = build_ledger(program, checkpoint).totals()
    counts, sizes = zip(*totals.values(), strict=True)
    assert sum(counts) == len(checkpoint.tensors) + len(checkpoint.scales)
    assert sum(sizes) == checkpoint.nbytes
    expected = {Bucket.REWRITTEN, Bucket.KEPT} | ({Bucket.CONSUMED, Bucket.LEFT_OUT} if options else set())
    assert {bucket for bucket, _ in totals} == expected


def test_the_float_policy_keeps_everything_but_mtp(tiny: Tiny) -> None:
    checkpoint = tiny(fp8=True, **MTP)
    buckets = Counter(entry.bucket for entry in ledger_of(checkpoint, "float").entries)
    left_out = sum(".layers.2." in name for name in checkpoint.tensors) * 1
    left_out += sum(".layers.2." in name for name in checkpoint.scales)
    consumed = sum(".layers.2." not in name for name in checkpoint.scales)
    floats = sum(".layers.2." not in name for name in checkpoint.tensors)
    assert buckets == {Bucket.KEPT: floats, Bucket.LEFT_OUT: left_out, Bucket.CONSUMED: consumed}


def test_totals_of_the_tiny_model(tiny: Tiny) -> None:
    """Linears of 256 x 256, attention of 64 + 96 + 40 + 256 rows, in bfloat16."""
    attention = 2 * 2 * (64 * 256 + 96 * 64 + 40 * 256 + 256 * 64)
    shared, dense, experts = (3 * 256 * 256 * 2 * count for count in (1, 1, 8))
    norms = 2 * (2 * 2 * 256 + 2 * (64 + 32) + 256)
    gate = 8 * 256 * 2 + 8 * 4
    assert ledger_of(tiny(), "deepseek_w4a8").totals() == {
        ("rewritten", "W8A8"): (8 + 3, attention + shared),
        ("rewritten", "W8A8_DYNAMIC"): (3, dense),
        ("rewritten", "W4A8_DYNAMIC"): (24, experts),
        ("kept", "attention at *.kv_b_proj → FLOAT"): (2, 2 * 2 * 128 * 32),
        ("kept", "embedding, norm, gate, head → FLOAT"): (2 + 9 + 2, 2 * 2 * 128 * 256 + norms + gate),
    }


def test_the_ledger_as_json(tiny: Tiny) -> None:
    checkpoint = tiny(fp8=True, **MTP)
    ledger = ledger_of(checkpoint, "deepseek_w4a8")
    document = ledger.as_json()
    assert sum(row["bytes"] for row in document["totals"]) == checkpoint.nbytes
    assert sum(row["tensors"] for row in document["totals"]) == len(document["tensors"]) == len(ledger.entries)
    (consumed,) = (row for row in document["totals"] if row["bucket"] == "consumed")
    assert consumed["why"] == "FP8 block scales, into their weights"
    first = document["tensors"][0]
    assert first == {"name": "lm_head.weight", "bucket": "kept", "why": first["why"], "nbytes": 128 * 256 * 2}


# what does not fit


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., tuple[Program, Checkpoint]]:
    """`broken(name=tensor, other=None)`: the tiny model's program and a checkpoint with these tensors put in or out."""

    def edited(options: dict[str, Any] | None = None, **changes: Tensor | None) -> tuple[Program, Checkpoint]:
        folder = write_checkpoint(tmp_path / "model", **(options or {}))
        program = float_program(open_checkpoint(folder))
        tensors = load_file(folder / "model.safetensors") | changes
        write_shards(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})
        return program, open_checkpoint(folder)

    return edited


Broken = Callable[..., tuple[Program, Checkpoint]]
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
NORM = "model.layers.0.self_attn.q_a_layernorm.weight"
BIAS = "model.layers.0.self_attn.o_proj.bias"


def refused(program: Program, checkpoint: Checkpoint) -> tuple[FxquantError, FxquantError]:
    """The refusals of the float graph and of the graph with recipes."""
    errors = []
    for policy in (None, "deepseek_w4a8"):
        if policy:
            AssignSchemes(load_policy(policy))(program)
        with pytest.raises(FxquantError) as caught:
            check_parameters(program, checkpoint)
        errors.append(caught.value)
    return errors[0], errors[1]


@pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_whole_checkpoint_passes_before_and_after_the_rewrite(options: dict[str, Any], tiny: Tiny) -> None:
    checkpoint = tiny(**options)
    check_parameters(float_program(checkpoint), checkpoint)
    check_parameters(rewritten(checkpoint, "deepseek_w4a8"), checkpoint)


@pytest.mark.parametrize("name", [EXPERT, NORM])
def test_a_missing_tensor_is_named(name: str, broken: Broken, tmp_path: Path) -> None:
    for error in refused(*broken(**{name: None})):
        assert (error.place, error.fact) == (str(tmp_path / "model"), f"tensor {name} is missing.")


def test_a_missing_bias_is_named(broken: Broken) -> None:
    for error in refused(*broken({"attention_bias": True}, **{BIAS: None})):
        assert error.fact == f"tensor {BIAS} is missing."


@pytest.mark.parametrize(
    ("name", "shape", "needed"), [(EXPERT, [256, 255], [256, 256]), (EXPERT, [65536], [256, 256]), (NORM, [63], [64])]
)
def test_a_wrong_shape_is_named_with_both(
    name: str, shape: list[int], needed: list[int], broken: Broken, tmp_path: Path
) -> None:
    for error in refused(*broken(**{name: torch.zeros(shape, dtype=torch.bfloat16)})):
        assert error.fact == f"tensor {name} is {shape}, the model needs {needed}."
        assert error.place == str(tmp_path / "model/model.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_an_integer_tensor_is_named(dtype: torch.dtype, broken: Broken) -> None:
    for error in refused(*broken(**{EXPERT: torch.zeros(256, 256, dtype=dtype)})):
        assert error.fact == f"tensor {EXPERT} is {dtype}: already quantized?"


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.extra.weight", "model.layers.1.mlp.experts.8.up_proj.weight", f"{EXPERT}_scale"]
)
def test_an_extra_tensor_is_named(name: str, broken: Broken) -> None:
    program, checkpoint = broken(**{name: torch.zeros(4)})
    check_parameters(program, checkpoint)
    AssignSchemes(load_policy("float"))(program)
    with pytest.raises(FxquantError, match=f"tensor {re.escape(name)} belongs to no parameter") as caught:
        build_ledger(program, checkpoint)
    assert caught.value.place.endswith("model.safetensors")


# multi-token prediction


def test_mtp_modules_are_those_with_tensors(tiny: Tiny) -> None:
    names = ("model.layers.1", "model.layers.2", "model.layers.20", "model.layers.1.self")
    assert mtp_modules(tiny(**MTP), names) == names[:2]
    assert mtp_modules(tiny(), names) == names[:1]


def test_mtp_tensors_that_the_config_does_not_mention_are_refused(tiny_folder: Callable[..., Path]) -> None:
    told = tiny_folder(**MTP)
    untold = open_checkpoint(told)
    config = {**untold.config, "num_nextn_predict_layers": 0}
    checkpoint = Checkpoint(untold.folder, config, untold.tensors)
    program = rewritten(checkpoint, "deepseek_w4a8")
    with pytest.raises(FxquantError, match=r"tensor model\.layers\.2\.\S+ belongs to no parameter") as caught:
        build_ledger(program, checkpoint)
    assert "config.json" in caught.value.remedy


def test_a_config_may_mention_mtp_without_tensors(tmp_path: Path) -> None:
    """As its own output does, which leaves the layer out."""
    folder = write_checkpoint(tmp_path / "model", **MTP)
    tensors = load_file(folder / "model.safetensors")
    write_shards(folder, {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name})
    checkpoint = open_checkpoint(folder)
    assert mtp_of(checkpoint) == ()
    assert Bucket.LEFT_OUT not in {entry.bucket for entry in ledger_of(checkpoint, "deepseek_w4a8").entries}
