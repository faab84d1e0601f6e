"""The decode operation in plain jnp: the definition that the compiled kernels are held to."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def _find_rows(table: Array, positions: Array, num_pages: int, page_size: int):
    """(page, slot) of each position in a request's ``table``; page is ``num_pages`` for nowhere."""
    logical = positions // page_size
    page = table.at[logical].get(mode="fill", fill_value=-1, wrap_negative_indices=False)
    exists = (positions >= 0) & (page >= 0) & (page < num_pages)
    return jnp.where(exists, page, num_pages), positions % page_size


@partial(jax.jit, static_argnames=("compress_ratio", "overlap", "out_dtype"))
def paged_kv_compress(
    kv: Array,
    score: Array,
    kv_score: Array,
    ape: Array,
    kv_tables: Array,
    score_tables: Array,
    kv_lens: Array,
    q_lens: Array,
    *,
    compress_ratio: int,
    overlap: bool,
    out_dtype: DTypeLike,
) -> tuple[Array, Array, Array]:
    """One decode step. Shapes as in ``jax_dsv4.paged_kv_compress``; returns (kv, score, kv_comp).

    ``ape`` is ``[0, S]`` for no bias, ``q_lens`` is ``[0]`` for all rows.
    """
    ratio = compress_ratio
    num_pages, page_size, state_dim = kv.shape
    batch, next_n, _ = kv_score.shape
    head_dim = state_dim // 2 if overlap else state_dim
    num_windows = -(-next_n // ratio)
    if 0 in (batch, num_pages, kv_tables.shape[1]):  # every row is nowhere, and jnp gathers none
        return kv, score, jnp.zeros((batch, num_windows, head_dim), out_dtype)
    find = jax.vmap(partial(_find_rows, num_pages=num_pages, page_size=page_size))

    n = jnp.clip(q_lens, 0, next_n) if q_lens.size else jnp.full_like(kv_lens, next_n)
    active = (kv_lens > 0) & (n > 0)
    first_position = jnp.where(active, kv_lens - n, 0)

    # 1. The new rows, each to its page and slot; rows that are not real go nowhere.
    t = jnp.arange(next_n, dtype=jnp.int32)
    positions = jnp.where((t < n[:, None]) & active[:, None], first_position[:, None] + t, -1)
    new_kv, new_score = jnp.split(kv_score.astype(jnp.float32), 2, axis=-1)
    if ape.size:
        new_score += ape[positions % ratio]
    kv = kv.at[find(kv_tables, positions)].set(new_kv.astype(kv.dtype), mode="drop")
    score = score.at[find(score_tables, positions)].set(new_score.astype(score.dtype), mode="drop")

    # 2. The windows that this step completes, oldest first.
    window = jnp.maximum(first_position, 0)[:, None] // ratio
    window += jnp.arange(num_windows, dtype=jnp.int32)
    completed = active[:, None] & (window < kv_lens[:, None] // ratio)

    # 3. Their rows as stored, then a softmax per channel. [batch, num_windows, rows, head_dim]
    def rows_of(window: Array, half: int) -> tuple[Array, Array]:
        positions = (window[..., None] * ratio + jnp.arange(ratio)).reshape(batch, -1)
        positions = jnp.where(jnp.repeat(completed & (window >= 0), ratio, axis=1), positions, -1)
        kv_page, kv_slot = find(kv_tables, positions)
        score_page, score_slot = find(score_tables, positions)
        columns = slice(half * head_dim, (half + 1) * head_dim)
        kv_rows = kv[:, :, columns].at[kv_page, kv_slot].get(mode="fill", fill_value=0)
        score_rows = score[:, :, columns].at[score_page, score_slot].get(mode="fill", fill_value=0)
        exists = ((kv_page < num_pages) & (score_page < num_pages))[..., None]
        kv_rows = jnp.where(exists, kv_rows.astype(jnp.float32), 0)
        score_rows = jnp.where(exists, score_rows.astype(jnp.float32), -jnp.inf)
        shape = (batch, num_windows, ratio, head_dim)
        return kv_rows.reshape(shape), score_rows.reshape(shape)

    if overlap:
        halves = rows_of(window - 1, 0), rows_of(window, 1)
        kv_rows, score_rows = (
            jnp.concatenate(parts, axis=2) for parts in zip(*halves, strict=True)
        )
    else:
        kv_rows, score_rows = rows_of(window, 0)
    highest = jnp.max(score_rows, axis=2, keepdims=True)
    weights = jnp.exp(score_rows - jnp.where(highest == -jnp.inf, 0, highest))
    total = jnp.sum(weights, axis=2)
    weighted = jnp.sum(weights * kv_rows, axis=2)
    value = jnp.where(total == 0, 0, weighted / jnp.where(total == 0, 1, total))
    return kv, score, jnp.where(completed[..., None], value, 0).astype(out_dtype)
