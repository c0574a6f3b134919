"""Rotation: what rotates is found in the graph, weights against dense matrices, the same function, and outputs."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import Measured
from safetensors.torch import load_file
from test_hadamard import dense
from test_smoothing import logits, policy_of
from tiny import float_program
from token_files import token_ids
from torch import Tensor

from fxquant import CompileOptions, FxquantError, compile, verify
from fxquant.calibration.calibration_file import CALIBRATION, load_calibration
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.rotated import rotation_transforms
from fxquant.lowering.weights.work import Workers
from fxquant.passes.find_rotation import NotRotatedError, find_rotations
from fxquant.planning.plan import plan
from fxquant.transforms.rotation import Rotate, Rotation
from fxquant.transforms.weight_transforms import WeightTransforms

BOTH = (Rotate.HIDDEN, Rotate.HEADS)
ROTATE = "rotate: [hidden, heads]"
LAYER = "model.layers.1"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"


def rotated_checkpoint(checkpoint: Checkpoint, parts: tuple[Rotate, ...] = BOTH) -> Checkpoint:
    return checkpoint.transformed(rotation_transforms(find_rotations(float_program(checkpoint), parts), checkpoint))


# what is found


def test_rotations_are_found_in_the_graph(tiny: Callable[..., Checkpoint]) -> None:
    rotations = find_rotations(float_program(tiny()), BOTH)
    before, after = f"{LAYER}.input_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"
    assert rotations["model.embed_tokens.weight"] == Rotation(columns=1)
    assert rotations["lm_head.weight"] == Rotation(columns=1, norm="model.norm.weight")
    ours = {name.removeprefix(f"{LAYER}."): rotation for name, rotation in rotations.items() if name.startswith(LAYER)}
    writes, reads = Rotation(heads=1, values=256), Rotation(columns=1, norm=after)
    experts = [f"mlp.experts.{index}" for index in range(8)] + ["mlp.shared_experts"]
    assert ours == {
        "self_attn.q_a_proj.weight": Rotation(columns=1, norm=before),
        "self_attn.kv_a_proj_with_mqa.weight": Rotation(columns=1, norm=before),
        "self_attn.kv_b_proj.weight": Rotation(heads=4, values=16),
        "self_attn.o_proj.weight": Rotation(columns=4, heads=1, values=256),
        "mlp.gate.weight": reads,
        **{f"{expert}.{name}.weight": reads for expert in experts for name in ("gate_proj", "up_proj")},
        **{f"{expert}.down_proj.weight": writes for expert in experts},
    }


def test_each_part_alone(tiny: Callable[..., Checkpoint]) -> None:
    program = float_program(tiny())
    heads, hidden = (find_rotations(program, (part,)) for part in (Rotate.HEADS, Rotate.HIDDEN))
    o_proj = f"{ATTENTION}.o_proj.weight"
    assert set(heads) & set(hidden) == {o_proj, o_proj.replace("1", "0")}
    assert heads[o_proj] == Rotation(columns=4) and hidden[o_proj] == Rotation(heads=1, values=256)
    assert not find_rotations(program, ())


@pytest.mark.parametrize(
    ("changes", "fact"),
    [({"hidden_size": 184}, "no Hadamard matrix of order 184"), ({"v_head_dim": 6}, "no Hadamard matrix of order 6")],
)
def test_sizes_without_a_matrix(tiny: Callable[..., Checkpoint], changes: dict[str, int], fact: str) -> None:
    with pytest.raises(NotRotatedError, match=fact):
        find_rotations(float_program(tiny(**changes)), BOTH)


def test_what_is_in_the_way_is_named(tiny: Callable[..., Checkpoint]) -> None:
    program = float_program(tiny())
    (head,) = [name for name in program.parameters if name.startswith("lm_head")]
    program.parameters[head] = replace(program.parameters[head], names=("model.embed_tokens.weight",))
    with pytest.raises(NotRotatedError, match=r"model\.embed_tokens\.weight would be rotated twice"):
        find_rotations(program, BOTH)
    program = float_program(tiny())
    for add in program.nodes(torch.ops.aten.add.Tensor)[:1]:
        add.target = torch.ops.aten.mul.Tensor
    with pytest.raises(NotRotatedError, match="reads the residual stream, but is not a norm"):
        find_rotations(program, BOTH)


# the weights


def of(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.read(name).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_are_those_of_dense_matrices(tiny: Callable[..., Checkpoint], dtype: torch.dtype) -> None:
    """Rounded once: half a step of the dtype, and what float32 adds up to before."""
    checkpoint = tiny(dtype=dtype)
    after, q, h = rotated_checkpoint(checkpoint), dense(256), torch.block_diag(*[dense(16)] * 4)
    g = {name: of(checkpoint, f"{LAYER}.{name}_layernorm.weight") for name in ("input", "post_attention")}
    keys_stay = torch.block_diag(*[torch.block_diag(torch.eye(16, dtype=torch.float64), dense(16))] * 4)
    expected = {
        "model.embed_tokens": of(checkpoint, "model.embed_tokens.weight") @ q,
        "lm_head": of(checkpoint, "lm_head.weight") * of(checkpoint, "model.norm.weight") @ q,
        f"{ATTENTION}.q_a_proj": of(checkpoint, f"{ATTENTION}.q_a_proj.weight") * g["input"] @ q,
        f"{ATTENTION}.kv_b_proj": keys_stay.T @ of(checkpoint, f"{ATTENTION}.kv_b_proj.weight"),
        f"{ATTENTION}.o_proj": q.T @ of(checkpoint, f"{ATTENTION}.o_proj.weight") @ h,
        f"{MLP}.gate": of(checkpoint, f"{MLP}.gate.weight") * g["post_attention"] @ q,
        f"{MLP}.experts.3.up_proj": of(checkpoint, f"{MLP}.experts.3.up_proj.weight") * g["post_attention"] @ q,
        f"{MLP}.experts.3.down_proj": q.T @ of(checkpoint, f"{MLP}.experts.3.down_proj.weight"),
    }
    for name, exact in expected.items():
        weight = of(after, f"{name}.weight")
        step, norm = torch.finfo(after.read(f"{name}.weight").dtype).eps, exact.norm() / exact.numel() ** 0.5
        assert ((weight - exact).abs() <= exact.abs() * step / 2 + 64 * 2.0**-24 * norm + 2.0**-24).all(), name
    for norm_name in ("input_layernorm", "post_attention_layernorm"):
        assert torch.equal(after.read(f"{LAYER}.{norm_name}.weight"), torch.ones(256, dtype=dtype))
    untouched = f"{ATTENTION}.q_b_proj.weight"
    assert torch.equal(after.read(untouched), checkpoint.read(untouched))


def test_rows_in_blocks_are_the_same_bits(tiny: Callable[..., Checkpoint]) -> None:
    after = rotated_checkpoint(tiny())
    name = "model.embed_tokens.weight"
    source, whole = tiny().read(name), after.read(name)
    parts = [after.transforms.apply(name, rows, 128, 48 * i) for i, rows in enumerate(source.split(48))]
    assert torch.equal(torch.cat(parts), whole)


def test_biases_turn_with_the_rows(tiny: Callable[..., Checkpoint]) -> None:
    checkpoint = tiny(attention_bias=True)
    after, name = rotated_checkpoint(checkpoint), f"{ATTENTION}.o_proj.bias"
    assert torch.allclose(
        of(after, name), of(checkpoint, name) @ dense(256), rtol=2.0**-8, atol=2.0**-9
    )  # bf16, near 0
    assert torch.equal(after.read(f"{ATTENTION}.q_a_proj.bias"), checkpoint.read(f"{ATTENTION}.q_a_proj.bias"))


# the function


@pytest.mark.parametrize("parts", [BOTH, (Rotate.HIDDEN,), (Rotate.HEADS,)], ids=str)
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"hidden_size": 192}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_function_stays(
    tiny: Callable[..., Checkpoint], parts: tuple[Rotate, ...], changes: dict[str, Any], dtype: torch.dtype
) -> None:
    """Every weight rounds once more: two a block and layer, which add up like a random walk; in float32 sums over k are
    sqrt(k) steps more. Of all tokens the median: one near a tie of two experts may go to the other."""
    checkpoint = tiny(dtype=dtype, **changes)
    program = float_program(checkpoint)
    before, after = logits(program, checkpoint), logits(program, rotated_checkpoint(checkpoint, parts))
    error, steps = (after - before).pow(2).mean(-1).sqrt().median(), 4.0
    if dtype is torch.float32:
        steps *= checkpoint.config["hidden_size"] ** 0.5
    assert 0 < error < steps * torch.finfo(dtype).eps * before.std()


# outputs


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_ids(tmp_path_factory.mktemp("text") / "ids.safetensors", seed=1)


@pytest.fixture(scope="module")
def rotated(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that was not calibrated on text. Do not write to it."""
    folder = tmp_path_factory.mktemp("rotated")
    policy = policy_of(folder, ROTATE, "deepseek_w4a8_dynamic")
    return compile(tiny_folder(), CompileOptions(policy=policy, out=folder / "out", export=False, verify=False)).out


def weights(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.rglob("*.safetensors"))}


@pytest.mark.parametrize("target", ["ascend", "mindie", "onnx"])
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_every_output(tiny_folder: Callable[..., Path], ids: Path, tmp_path: Path, target: str, fp8: bool) -> None:
    """`compile` verifies weights, graph and reader; smoothing comes on top."""
    policy = policy_of(tmp_path, ROTATE)
    options = CompileOptions(policy=policy, out=tmp_path / "out", target=target, calib=ids, export=False)  # type: ignore[arg-type]
    report = compile(tiny_folder(fp8=fp8), options)
    assert report.verification is not None and report.verification.ok
    checks = {check.name: check for check in report.verification.checks}
    ends, dense_layer, expert_layer, norms = 2, 4 + 3, 4 + 1 + 9 * 3, 5
    assert checks["rotation keeps the function"].checked == ends + dense_layer + expert_layer + norms
    saved = load_calibration(tmp_path / "out" / CALIBRATION).transforms
    assert len(saved.norms) == 5 and saved.scales


def test_without_calibration(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    policy, out = policy_of(tmp_path, ROTATE, "deepseek_w4a8_dynamic"), tmp_path / "out"
    report = compile(tiny_folder(), CompileOptions(policy=policy, out=out, export=False))
    assert report.verification is not None and report.verification.ok
    saved = load_calibration(out / CALIBRATION)
    assert saved.transforms.rotations and not len(saved.tokens) and not saved.ranges


def test_any_number_of_workers_gives_the_same_bytes(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    policy, source = policy_of(tmp_path, ROTATE, "deepseek_w4a8_dynamic"), tiny_folder(fp8=True)
    for jobs in (1, 2):
        options = CompileOptions(
            policy=policy, out=tmp_path / str(jobs), export=False, verify=False, workers=Workers(jobs=jobs)
        )
        compile(source, options)
    assert weights(tmp_path / "1") == weights(tmp_path / "2")


def test_reuse_knows_what_was_rotated(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """An output of other rotations gives what they do not touch; the bytes are those of a compile from nothing."""
    first, fresh, reused = (tmp_path / name for name in ("first", "fresh", "reused"))
    heads = policy_of(tmp_path, "rotate: [heads]", "deepseek_w4a8_dynamic")
    compile(tiny_folder(), CompileOptions(policy=heads, out=first, export=False, verify=False))
    both = policy_of(tmp_path, ROTATE, "deepseek_w4a8_dynamic")
    compile(tiny_folder(), CompileOptions(policy=both, out=fresh, export=False, verify=False))
    compile(tiny_folder(), CompileOptions(policy=both, out=reused, export=False, verify=False, reuse=first))
    assert weights(fresh) == weights(reused)


def test_a_saved_calibration_has_the_rotations(tiny_folder: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    first, second, policy = tmp_path / "first", tmp_path / "second", policy_of(tmp_path, ROTATE)
    compile(tiny_folder(), CompileOptions(policy=policy, out=first, calib=ids, export=False, verify=False))
    saved = first / CALIBRATION
    compile(tiny_folder(), CompileOptions(policy=policy, out=second, calibration=saved, export=False, verify=False))
    assert weights(first) == weights(second)
    with pytest.raises(FxquantError, match="the file has other smoothing than policy"):
        compile(tiny_folder(), CompileOptions(policy="deepseek_w4a8", out=tmp_path / "third", calibration=saved))


def test_gptq_sees_rotated_weights(tiny_folder: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    text = f"{ROTATE}\nunseen_experts: all_tokens\nrules: [{{kind: attention, scheme: W8A8_DYNAMIC, algorithm: gptq}}]"
    policy = policy_of(tmp_path, text)
    (tmp_path / "policy.yaml").write_text(
        text.replace(
            "rules: [", "extends: deepseek_w4a8\nrules: [{kind: attention, path: '*.kv_b_proj', scheme: FLOAT}, "
        )
    )
    report = compile(tiny_folder(), CompileOptions(policy=policy, out=tmp_path / "out", calib=ids, export=False))
    assert report.verification is not None and report.verification.ok


def test_multi_token_prediction_is_refused(tiny_folder: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    source = tiny_folder(num_nextn_predict_layers=1)
    options = CompileOptions(policy=policy_of(tmp_path, ROTATE), out=tmp_path / "out", calib=ids, mtp="float")  # type: ignore[arg-type]
    with pytest.raises(FxquantError, match="rotates what multi-token prediction layers read"):
        compile(source, options)
    heads = policy_of(tmp_path, "rotate: [heads]")
    compile(source, replace(options, policy=heads, export=False))


def damaged(transforms: WeightTransforms) -> list[Callable[[], object]]:
    """Ways to spoil a rotation that leave it well formed."""
    gate, norm = f"{MLP}.gate.weight", f"{LAYER}.input_layernorm.weight"
    return [
        lambda: transforms.rotations.pop(gate),
        lambda: transforms.rotations.update({gate: Rotation(columns=1)}),
        lambda: transforms.rotations.update({f"{ATTENTION}.q_b_proj.weight": Rotation(columns=1)}),
        lambda: transforms.norms[norm].mul_(2),
        lambda: transforms.tensors[norm].mul_(2),
        lambda: transforms.rotations.update({f"{ATTENTION}.kv_b_proj.weight": Rotation(heads=2, values=32)}),
    ]


@pytest.mark.parametrize("which", range(6))
def test_verify_knows_a_function_that_changed(
    tiny_folder: Callable[..., Path], rotated: Path, tmp_path: Path, which: int
) -> None:
    """The check of the function itself does, whatever the weights then say of it; the digests are taken away."""
    out = shutil.copytree(rotated, tmp_path / "out")
    (out / "fxquant_manifest.json").unlink()
    calibration = load_calibration(out / CALIBRATION)
    damaged(calibration.transforms)[which]()
    calibration.save(out / CALIBRATION)
    report = verify(out, against=tiny_folder())
    assert any("keeps the function" in check.name and check.misses for check in report.checks)


def test_bad_rotations_in_a_file_are_refused(rotated: Path, tmp_path: Path) -> None:
    for rotation in (Rotation(columns=-1), Rotation(columns=1, norm="model.other.weight"), Rotation(heads=1.5)):  # type: ignore[arg-type]
        calibration = load_calibration(rotated / CALIBRATION)
        calibration.transforms.rotations["lm_head.weight"] = rotation
        calibration.save(tmp_path / "bad.safetensors")
        with pytest.raises(FxquantError, match=r"invalid rotation of lm_head\.weight"):
            load_calibration(tmp_path / "bad.safetensors")
    assert load_file(rotated / CALIBRATION)


def test_plan_knows_what_is_whole_in_memory(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    policies = (policy_of(tmp_path, ROTATE, "deepseek_w4a8_dynamic"), "deepseek_w4a8_dynamic")
    planned, plain = (plan(tiny_folder(), CompileOptions(policy=policy), measuring=Measured()) for policy in policies)
    assert planned.whole == 2 * 256 * 256 * 2 and plain.whole == 0
    assert planned.memory.per_worker == plain.memory.per_worker + planned.whole
    assert planned.files == plain.files
