"""Routed experts: every engine's layout stands for the integers and scales that were stored, on any number of ranks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from open_readers import open_reader
from reader_folders import EXPERTS, Draft, Truth
from torch import Tensor

from fxquant.engine_readers import Arithmetic, Loaded

HIDDEN, WIDTH = 256, 4096
"""16 ranks of down_proj get one group of 256 each."""
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ENGINES = {
    "vllm-ascend": (0, True),
    "vllm-ascend-per-group": (256, True),
    "sglang-npu": (0, True),
    "mindie": (256, True),
    "mindie-2.1rc1": (256, False),
}


def draft_for(engine: str, dtype: torch.dtype = torch.bfloat16) -> Draft:
    group, packed = ENGINES[engine]
    draft = Draft(dtype)
    draft.expert_layer(HIDDEN, WIDTH, group, packed)
    return draft.for_engine(engine, group)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Draft, Path]]:
    """Engine → what a folder that it reads stands for, and the folder."""
    drafts = {engine: draft_for(engine) for engine in ENGINES}
    return {engine: (draft, draft.write(tmp_path_factory.mktemp(engine))) for engine, draft in drafts.items()}


def load(engine: str, folder: Path, projection: str, ranks: int = 1, expert: int = 1) -> Loaded:
    reader = open_reader(engine, folder, ranks)
    return reader.expert_linear(f"{EXPERTS}.{expert}.{projection}", projection == "down_proj")


def random_input(projection: str) -> Tensor:
    k = WIDTH if projection == "down_proj" else HIDDEN
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(11))
    x[1] += 2  # a mean, so that sums do not cancel
    return x


def miss(loaded: Loaded, draft: Draft, projection: str, expert: int = 1) -> float:
    """Largest distance from what is stored, in bounds; above one is a miss."""
    return miss_of(loaded, draft.truths[f"{EXPERTS}.{expert}.{projection}"], random_input(projection))


def miss_of(loaded: Loaded, truth: Truth, x: Tensor) -> float:
    """As `miss`, for any input."""
    x8, x_scale = loaded.quantize(x, Arithmetic.EXACT)
    ideal = truth.result(x8, x_scale)
    return float(((loaded(x, Arithmetic.EXACT).double() - ideal).abs() / loaded.bound(x)).max())


SPLIT = [engine for engine in ENGINES if engine != "sglang-npu"]
"""Engines whose tensor-parallel ranks split experts; SGLang's keep int4 ones whole."""


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("engine", SPLIT)
def test_any_number_of_ranks_gives_what_is_stored(
    folders: dict[str, tuple[Draft, Path]], engine: str, projection: str
) -> None:
    draft, folder = folders[engine]
    x, results = random_input(projection), []
    for ranks in (1, 2, 4, 8, 16):
        loaded = load(engine, folder, projection, ranks)
        assert torch.equal(loaded.codes().long(), draft.truths[f"{EXPERTS}.1.{projection}"].codes)
        assert miss(loaded, draft, projection) <= 1
        results.append(loaded(x, Arithmetic.EXACT))
    for other in results[1:]:  # float64 sums in another order, rounded to float32: neighbours at most
        assert ((other - results[0]).abs() <= 2.0**-23 * results[0].abs()).all()


@pytest.mark.parametrize("engine", SPLIT)
def test_every_rank_of_down_proj_gives_its_own_part(folders: dict[str, tuple[Draft, Path]], engine: str) -> None:
    draft, folder = folders[engine]
    loaded, x = load(engine, folder, "down_proj", 8), random_input("down_proj")
    x8, x_scale = loaded.quantize(x, Arithmetic.EXACT)
    truth, partials, bounds = (
        draft.truths[f"{EXPERTS}.1.down_proj"], loaded.partials(x, Arithmetic.EXACT), loaded.partial_bounds(x)
    )  # fmt: skip
    for rank in range(8):
        part = slice(rank * WIDTH // 8, (rank + 1) * WIDTH // 8)
        sums = x8[:, part].double() @ truth.codes[:, part].double().T
        ideal = sums * truth.scale * x_scale.double()
        assert ((partials[rank] - ideal).abs() <= bounds[rank] + 2.0**-50 * ideal.abs()).all()


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_devices_roundings_cost_what_they_may(
    folders: dict[str, tuple[Draft, Path]], engine: str, projection: str
) -> None:
    """Scales lose 2**-10 (19 bits). A partial sum of nibbles, high ones counting 16, is rounded to float16, then G of
    them are added there: G + 1 roundings of 2**-11 at most of all magnitudes. The output is rounded by 2**-8."""
    draft, folder = folders[engine]
    loaded, x = load(engine, folder, projection), random_input(projection).bfloat16().float()
    exact, kernel = (loaded(x, arithmetic) for arithmetic in Arithmetic)
    assert torch.equal(kernel.bfloat16().float(), kernel)
    truth, groups = draft.truths[f"{EXPERTS}.1.{projection}"], max(1, x.shape[1] // 256)
    x8, x_scale = loaded.quantize(x, Arithmetic.KERNEL)
    codes, magnitude = truth.codes.double().unflatten(1, (groups, -1)), torch.zeros_like(exact, dtype=torch.float64)
    for factor, part in ((16, x8.double() // 16), (1, x8.double() % 16 - 8)):
        sums = torch.einsum("mgk,ngk->mng", part.unflatten(1, (groups, -1)), codes).abs().sum(-1)
        magnitude += factor * sums * truth.scale * x_scale.double()
    bound = (2.0**-10 + (groups + 1) * 2.0**-11) * magnitude * (1 + 2.0**-8) + 2.0**-8 * exact.abs()
    assert ((kernel.double() - exact.double()).abs() <= bound).all()
    assert not torch.equal(kernel, exact)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "sglang-npu"])
def test_float16_models(tmp_path: Path, engine: str) -> None:
    draft = draft_for(engine, torch.float16)
    folder = draft.write(tmp_path)
    for projection in PROJECTIONS:
        assert miss(load(engine, folder, projection), draft, projection) <= 1


@pytest.mark.parametrize("engine", ["mindie", "mindie-2.1rc1"])
def test_mindie_rounds_the_scales_of_channels_too(tmp_path: Path, engine: str) -> None:
    """To float16, and before, since 3.0.0, to the model's dtype; scale_bias holds the scale as it is."""
    draft = Draft()
    draft.expert_layer(HIDDEN, 1024, 0, packed=engine == "mindie")
    folder, x = draft.for_engine(engine, 0).write(tmp_path), random_input("gate_proj").repeat(1, 4)
    module = f"{EXPERTS}.1.down_proj"
    held = draft.truths[module].scale.bfloat16() if engine == "mindie" else draft.truths[module].scale
    if engine == "mindie":
        loaded = open_reader(engine, folder).expert_linear(module, row_parallel=True)
        assert torch.equal(loaded.shards[0].layout.combined(slice(None))[:, 0].double(), held.half().double())
        assert miss_of(loaded, draft.truths[module], x) <= 1
        return
    draft.truths[module] = replace(draft.truths[module], scale=held.half().double())
    for ranks in (1, 2, 16):
        loaded = open_reader(engine, folder, ranks).expert_linear(module, row_parallel=True)
        x8, x_scale = loaded.quantize(x, Arithmetic.EXACT)
        ideal = draft.truths[module].result(x8, x_scale)
        assert ((loaded(x, Arithmetic.EXACT).double() - ideal).abs() <= 2.0**-23 * ideal.abs()).all()


def test_int8_experts_are_linears_of_their_own(tmp_path: Path) -> None:
    draft = Draft()
    for expert in range(2):
        for name in PROJECTIONS[:2]:
            draft.per_token(f"{EXPERTS}.{expert}.{name}", 64, 256)
        draft.per_token(f"{EXPERTS}.{expert}.down_proj", 256, 64)
    loaded = open_reader("vllm-ascend", draft.write(tmp_path), 4).expert_linear(f"{EXPERTS}.1.down_proj", True)
    x = random_input("gate_proj")[:, :64]
    x8, x_scale = loaded.quantize(x, Arithmetic.EXACT)
    ideal = draft.truths[f"{EXPERTS}.1.down_proj"].result(x8, x_scale)
    assert ((loaded(x, Arithmetic.EXACT).double() - ideal).abs() <= loaded.bound(x)).all()


def test_with_mix_shared_routing_the_shared_expert_is_the_one_after_the_last(tmp_path: Path) -> None:
    draft, shared = draft_for("mindie"), "model.layers.3.mlp.shared_experts"
    for name in PROJECTIONS:
        n, k = (HIDDEN, WIDTH) if name == "down_proj" else (WIDTH, HIDDEN)
        draft.expert(f"{shared}.{name}", n, k, 256, 16 if name == "down_proj" else 1)
    reader, x = open_reader("mindie", draft.write(tmp_path), 2), random_input("down_proj")
    linear = reader.linear(f"{shared}.down_proj", row_parallel=True)
    expert = reader.expert_linear(f"{EXPERTS}.2.down_proj", row_parallel=True)
    assert torch.equal(linear.codes().long(), draft.truths[f"{shared}.down_proj"].codes)
    assert torch.equal(linear(x, Arithmetic.KERNEL), expert(x, Arithmetic.KERNEL))
