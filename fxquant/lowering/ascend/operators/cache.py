"""Paged cache operator: writes keys and values into pages. Formula: op-plugin and ops-transformer documentation."""

from torch import Tensor

from fxquant.lowering.ascend.operators.arguments import require


def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """cache_mode Norm: `cache[slot // block_size, slot % block_size] = row` for each of n rows, in place.

    key [n, N, D] and key_cache [num_blocks, block_size, N, D], value and value_cache likewise with their own D;
    slot_mapping int32 [n], rows with slot -1 are not written.
    """
    name = "npu_scatter_pa_kv_cache"
    require(cache_mode == "Norm", f"{name}: cache_mode {cache_mode!r} is not supported, only 'Norm'")
    _check("key", key, key_cache, slot_mapping)
    _check("value", value, value_cache, slot_mapping)
    slots = key_cache.shape[0] * key_cache.shape[1]
    require(((slot_mapping >= -1) & (slot_mapping < slots)).all(), f"{name}: slot_mapping is not within {slots} slots")
    written = slot_mapping >= 0
    for rows, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *cache.shape[2:])[slot_mapping[written].long()] = rows[written]


def _check(argument: str, rows: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    name = "npu_scatter_pa_kv_cache"
    fits = cache.dim() == 4 and cache.is_contiguous() and rows.shape == (len(slot_mapping), *cache.shape[2:])
    require(fits, f"{name}: {argument} {tuple(rows.shape)} does not fit {argument}_cache {tuple(cache.shape)}")
    kinds = rows.dtype, cache.dtype
    require(kinds[0] == kinds[1], f"{name}: {argument} is {kinds[0]}, {argument}_cache is {kinds[1]}")
    require(
        slot_mapping.dim() == 1 and not slot_mapping.is_floating_point(), f"{name}: slot_mapping is not integers [n]"
    )
