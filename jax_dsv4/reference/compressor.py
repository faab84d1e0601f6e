"""A decode step that ends in records, in plain jnp: the two operations that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_dsv4.reference.decode import paged_kv_compress
from jax_dsv4.reference.records import store_records
from jax_dsv4.windows import completed_windows


def decode_records(*operands: Array, compressors: Sequence[Any]) -> tuple[Array, ...]:
    """One step of each of ``compressors`` -> its kv, score and pool, of one after the other.

    Operands in the order of the custom call; empty arrays for what is not given.
    """
    *own, kv_lens, q_lens, layer = operands
    size = len(own) // len(compressors)
    results = []
    for i, c in enumerate(compressors):
        kv_score, new_score, ape, kv, score, kv_tables, score_tables, *to_records = own[
            i * size : (i + 1) * size
        ]
        tables, norm_weight, cos_sin_cache, pool = to_records
        if not new_score.size:
            kv_score = kv_score[..., c.column : c.column + 2 * kv.shape[-1]]
        values, kv, score = paged_kv_compress(
            *(kv_score, new_score, ape, kv, score, kv_tables, score_tables),
            *(kv_lens, q_lens, layer),
            **_without_layer(c.decode),
        )
        windows = completed_windows(
            kv_lens,
            compress_ratio=c.decode.compress_ratio,
            next_n=kv_score.shape[1],
            q_lens=q_lens if q_lens.size else None,
        )
        slots = _find_slots(tables, windows.window, pool.shape[-2], c.store.page_size)
        (pool,) = store_records(
            *(values.reshape(-1, values.shape[-1]), slots.reshape(-1)),
            *(windows.position.reshape(-1), norm_weight, cos_sin_cache, pool, layer),
            **_without_layer(c.store),
        )
        results += [kv, score, pool]
    return tuple(results)


def _without_layer(options: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "layer"}


def _find_slots(tables: Array, window: Array, num_pages: int, page_size: int) -> Array:
    """The slot of each window's record [B, M]; -1 where there is no window, or no page for it."""
    if 0 in tables.shape:
        return jnp.full(window.shape, -1, jnp.int32)
    logical = window // page_size
    page = jnp.take_along_axis(tables, jnp.clip(logical, 0, tables.shape[1] - 1), axis=1)
    exists = (window >= 0) & (logical < tables.shape[1]) & (page >= 0) & (page < num_pages)
    return jnp.where(exists, page * page_size + window % page_size, -1)
