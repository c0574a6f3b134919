"""Unpacked int4 experts, one int4 per int8, as MindIE reads them."""

import torch

from fxquant.engine_readers.activation import PerToken
from fxquant.engine_readers.folder import Expected, WeightFolder
from fxquant.engine_readers.int4_terms import TwoLevel
from fxquant.engine_readers.names import DOWN, ExpertPath
from fxquant.engine_readers.ranks import Ranks
from fxquant.engine_readers.split import Split
from fxquant.engine_readers.unpacked_shard import UnpackedShard
from fxquant.errors import FxquantError


def load_unpacked(folder: WeightFolder, path: ExpertPath, ranks: int, group_size: int | None) -> Ranks:
    """One projection of one expert, its rows or its groups of k split over the ranks.

    group_size 0: one scale per output channel, which the ATB path rounds to float16 too; None: config.json lacks it.
    """
    module = path.module(path.projection)
    n, k = folder.shape(f"{module}.weight")
    if group_size is None or (group_size and k % group_size):
        fact = f"in_features {k}, and group_size {group_size} in quantization_config of config.json."
        raise FxquantError(module, fact, "Quantize with a group_size that divides it, and write it there.")
    stored = folder.load(module, _expected(n, k, group_size))
    weight, second = stored["weight"], stored.get("weight_scale_second", torch.ones(n, 1))
    scales = TwoLevel(stored["weight_scale"].squeeze(1), second)
    scales.check(module)
    if not torch.equal(weight, weight.clamp(-8, 7)):
        fact = f"holds {int(weight.min())} … {int(weight.max())}, int4 is -8 … 7."
        raise FxquantError(f"{module}.weight", fact, "Store one int4 in each int8.")
    row_parallel = path.projection == DOWN
    unit = group_size if row_parallel and group_size else 1
    shards = []
    for _, rows, inner in Split(ranks, row_parallel, whole=False).places(module, n, k, unit):
        groups = slice(inner.start // group_size, inner.stop // group_size) if group_size else slice(None)
        shards.append(UnpackedShard(weight[rows, inner], scales.rows(rows).groups(groups)))
    return Ranks(tuple(shards), row_parallel, PerToken(folder.dtype), folder.dtype)


def _expected(n: int, k: int, group_size: int) -> dict[str, Expected]:
    parameters = {
        "weight": Expected((n, k), (torch.int8,)),
        "weight_scale": Expected((n, 1), (torch.float32,)),
        "weight_offset": Expected((n, 1), (torch.float32,)),
    }
    if group_size:
        parameters["weight_scale_second"] = Expected((n, k // group_size), (torch.float32,))
        parameters["weight_offset_second"] = Expected((n, k // group_size), (torch.int64,))
    return parameters
