"""Decode steps and ragged batches that end in records, in plain jnp: the two operations of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_dsv4.reference.decode import paged_kv_compress
from jax_dsv4.reference.ragged import ragged_kv_compress
from jax_dsv4.reference.records import store_records
from jax_dsv4.windows import completed_windows, ragged_windows


def decode_records(*operands: Array, compressors: Sequence[Any]) -> tuple[Array, ...]:
    """One step of each of ``compressors`` -> its kv, score and pool, of one after the other.

    Operands in the order of the custom call; empty arrays for what is not given.
    """
    *own, kv_lens, q_lens, layer = operands
    results = []
    for c, to_values, to_records in _parts_of(own, compressors):
        values, *state = paged_kv_compress(
            *to_values, kv_lens, q_lens, layer, **_without_layer(c.values)
        )
        windows = completed_windows(
            kv_lens,
            compress_ratio=c.values.compress_ratio,
            next_n=to_values[0].shape[1],
            q_lens=q_lens if q_lens.size else None,
        )
        requests = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)[:, None]
        requests = jnp.broadcast_to(requests, windows.window.shape)
        results += [*state, _store(values, requests, windows.window, to_records, layer, c)]
    return tuple(results)


def ragged_records(*operands: Array, compressors: Sequence[Any]) -> tuple[Array, ...]:
    """The same of a ragged batch."""
    *own, kv_lens, cu_q_lens, num_seqs, layer = operands
    batch = kv_lens, cu_q_lens, num_seqs
    results = []
    for c, to_values, to_records in _parts_of(own, compressors):
        values, *state = ragged_kv_compress(*to_values, *batch, layer, **_without_layer(c.values))
        windows = ragged_windows(
            cu_q_lens,
            kv_lens,
            num_rows=to_values[0].shape[0],
            compress_ratio=c.values.compress_ratio,
            num_seqs=num_seqs[0] if num_seqs.size else None,
        )
        results += [*state, _store(values, *windows, to_records, layer, c)]
    return tuple(results)


def _parts_of(
    operands: Sequence[Array], compressors: Sequence[Any]
) -> Iterator[tuple[Any, Sequence[Array], Sequence[Array]]]:
    """Of each compressor: itself, and its operands of both operations."""
    size = len(operands) // len(compressors)
    for i, c in enumerate(compressors):
        kv_score, new_score, ape, kv, *others = operands[i * size : (i + 1) * size]
        if not new_score.size:
            kv_score = kv_score[..., c.column : c.column + 2 * kv.shape[-1]]
        yield c, (kv_score, new_score, ape, kv, *others[:-4]), others[-4:]


def _store(
    values: Array,
    requests: Array,
    windows: Array,
    operands: Sequence[Array],
    layer: Array,
    c: Any,
) -> Array:
    """The pool with the records of ``values`` [*windows, D] of ``windows`` of ``requests``."""
    tables, norm_weight, cos_sin_cache, pool = operands
    requests, windows = requests.reshape(-1), windows.reshape(-1)
    slots = _find_slots(tables, requests, windows, pool.shape[-2], c.store.page_size)
    (pool,) = store_records(
        *(values.reshape(-1, values.shape[-1]), slots, windows * c.values.compress_ratio),
        *(norm_weight, cos_sin_cache, pool, layer),
        **_without_layer(c.store),
    )
    return pool


def _without_layer(options: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "layer"}


def _find_slots(
    tables: Array, requests: Array, windows: Array, num_pages: int, page_size: int
) -> Array:
    """The slot of each window's record; -1 where there is no window, or no page for it."""
    if 0 in tables.shape:
        return jnp.full(windows.shape, -1, jnp.int32)
    logical = windows // page_size
    page = tables.at[requests, logical].get(mode="fill", fill_value=-1)
    exists = (windows >= 0) & (page >= 0) & (page < num_pages)
    return jnp.where(exists, page * page_size + windows % page_size, -1)
