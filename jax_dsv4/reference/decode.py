"""The decode operation in plain jnp."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jax_dsv4.reference.paging import pool_of


@partial(jax.jit, static_argnames=("compress_ratio", "overlap", "state_format", "out_dtype"))
def paged_kv_compress(
    kv_score: Array,
    new_score: Array,
    ape: Array,
    kv: Array,
    score: Array,
    kv_tables: Array,
    score_tables: Array,
    kv_lens: Array,
    q_lens: Array,
    layer: Array,
    *,
    compress_ratio: int,
    overlap: bool,
    state_format: str,
    out_dtype: DTypeLike,
) -> tuple[Array, Array, Array]:
    """One decode step -> (kv_comp, kv, score); operands in the order of the custom call.

    Shapes as in ``jax_dsv4.paged_kv_compress``, and empty arrays for what is not given:
    ``new_score`` (then the second half of ``kv_score``), ``ape`` ``[0, S]``, ``q_lens`` ``[0]``,
    ``layer`` ``[0]``.
    """
    ratio, state_shape = compress_ratio, kv.shape
    batch, next_n, _ = kv_score.shape
    state_dim = state_shape[-1]
    head_dim = state_dim // 2 if overlap else state_dim
    num_windows = -(-next_n // ratio)
    if 0 in (batch, kv.size, kv_tables.shape[1]):  # every row is nowhere, and jnp gathers none
        return jnp.zeros((batch, num_windows, head_dim), out_dtype), kv, score
    kv, pool = pool_of(kv, layer)
    score, _ = pool_of(score, layer)

    n = jnp.clip(q_lens, 0, next_n) if q_lens.size else jnp.full_like(kv_lens, next_n)
    active = (kv_lens > 0) & (n > 0)
    if layer.size:
        active &= (layer >= 0) & (layer < state_shape[0])
    first_position = jnp.where(active, kv_lens - n, 0)

    # The new rows, and the places of those that are real; the others go nowhere.
    t = jnp.arange(next_n, dtype=jnp.int32)[None]
    positions = jnp.where((t < n[:, None]) & active[:, None], first_position[:, None] + t, -1)
    parts = (kv_score, new_score) if new_score.size else jnp.split(kv_score, 2, axis=-1)
    new_kv, new_score = (x.astype(jnp.float32) for x in parts)
    if ape.size:
        new_score += ape[positions % ratio]
    kv_at, score_at = pool.find_rows(kv_tables, positions), pool.find_rows(score_tables, positions)

    # The windows that this step completes, oldest first.
    window = jnp.maximum(first_position, 0)[:, None] // ratio
    window += jnp.arange(num_windows, dtype=jnp.int32)[None]
    completed = active[:, None] & (window < kv_lens[:, None] // ratio)

    # What a window contributes to the next one's value, and to its own.
    to_next, to_own = slice(head_dim), slice(-head_dim, None)

    def read(kv: Array, score: Array, positions: Array, columns: slice = slice(None)):
        """The rows at ``positions`` in f32, 0 and -inf where nowhere. [*positions, columns]"""
        rows = positions.reshape(batch, -1)
        kv_page, kv_slot = pool.find_rows(kv_tables, rows)
        score_page, score_slot = pool.find_rows(score_tables, rows)
        exists = ((kv_page < pool.nowhere) & (score_page < pool.nowhere))[..., None]
        kv_rows = jnp.where(exists, kv[kv_page, kv_slot, columns].astype(jnp.float32), 0)
        score_rows = score[score_page, score_slot, columns].astype(jnp.float32)
        score_rows = jnp.where(exists, score_rows, -jnp.inf)
        shape = (*positions.shape, -1)
        return kv_rows.reshape(shape), score_rows.reshape(shape)

    def write(kv: Array, score: Array, new_kv: Array, new_score: Array):
        kv = kv.at[kv_at].set(new_kv.astype(kv.dtype), mode="drop")
        return kv, score.at[score_at].set(new_score.astype(score.dtype), mode="drop")

    if state_format == "raw":
        kv, score = write(kv, score, new_kv, new_score)

        # The windows' rows as stored, then a softmax per channel.
        def rows_of(window: Array, columns: slice) -> tuple[Array, Array]:
            positions = window[..., None] * ratio + jnp.arange(ratio, dtype=jnp.int32)[None, None]
            needed = (completed & (window >= 0))[..., None]
            return read(kv, score, jnp.where(needed, positions, -1), columns)

        kv_rows, score_rows = rows_of(window, to_own)
        if overlap:
            before = rows_of(window - 1, to_next)
            kv_rows = jnp.concatenate((before[0], kv_rows), axis=2)
            score_rows = jnp.concatenate((before[1], score_rows), axis=2)
        value = softmax_mean(kv_rows, score_rows)
    else:
        # The prefix before the step, and after each new row.
        before = read(kv, score, first_position - 1)
        exists = (kv_at[0] < pool.nowhere) & (score_at[0] < pool.nowhere)
        starts = positions % ratio == 0
        means, lses = _scan_prefixes(before, (new_kv, new_score), exists, starts)

        # Those after each window's last row, of this step or of one before it.
        def last_of(window: Array, columns: slice) -> tuple[Array, Array]:
            position = jnp.where(completed, (window + 1) * ratio - 1, -1)
            mean, lse = read(kv, score, position, columns)
            row = position - first_position[:, None]
            is_new, row = (row >= 0)[..., None], jnp.clip(row, 0, next_n - 1)[..., None]
            new_mean = jnp.take_along_axis(means[..., columns], row, axis=1)
            new_lse = jnp.take_along_axis(lses[..., columns], row, axis=1)
            return jnp.where(is_new, new_mean, mean), jnp.where(is_new, new_lse, lse)

        mean, lse = last_of(window, to_own)
        if overlap:
            mean, lse = merge(last_of(window - 1, to_next), (mean, lse))
        value = jnp.where(lse == -jnp.inf, 0, mean)
        kv, score = write(kv, score, means, lses)
    kv_comp = jnp.where(completed[..., None], value, 0).astype(out_dtype)
    return kv_comp, kv.reshape(state_shape), score.reshape(state_shape)


def softmax_mean(kv: Array, score: Array) -> Array:
    """softmax(score) . kv over the last axis but one; 0 where every score is -inf."""
    highest = jnp.max(score, axis=-2, keepdims=True)
    weights = jnp.exp(score - jnp.where(highest == -jnp.inf, 0, highest))
    total = jnp.sum(weights, axis=-2)
    weighted = jnp.sum(weights * kv, axis=-2)
    return jnp.where(total == 0, 0, weighted / jnp.where(total == 0, 1, total))


def merge(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """(mean, lse) of the rows of both: ``merge`` in ``ffi/prefix.h``, which says why so."""
    (a_mean, a_lse), (b_mean, b_lse) = a, b
    difference = b_lse - a_lse
    ratio = jnp.exp(-jnp.fmin(jnp.abs(difference), 200))
    high = jnp.maximum(a_lse, b_lse)
    weight = jnp.where(high < jnp.inf, ratio / (1 + ratio), jnp.nan)
    swap = difference > 0
    heavy, light = jnp.where(swap, b_mean, a_mean), jnp.where(swap, a_mean, b_mean)
    step = light - heavy
    mean = jnp.where(
        jnp.isfinite(step), heavy + step * weight, heavy * (1 - weight) + light * weight
    )
    return mean, high + jnp.log1p(ratio)


def _scan_prefixes(
    carry: tuple[Array, Array], rows: tuple[Array, Array], exists: Array, starts: Array
) -> tuple[Array, Array]:
    """The prefixes after each of ``rows`` [B, next_n, S], from the one before them [B, S].

    A row that does not exist passes the prefix on; one that starts a window forgets it first.
    """

    def merge_row(carry, xs):
        row, exists, starts = xs
        mean, lse = carry
        carry = jnp.where(starts[:, None], 0, mean), jnp.where(starts[:, None], -jnp.inf, lse)
        merged = merge(carry, row)
        carry = tuple(
            jnp.where(exists[:, None], new, old) for new, old in zip(merged, carry, strict=True)
        )
        return carry, carry

    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (rows, exists, starts))
    _, prefixes = jax.lax.scan(merge_row, carry, xs)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), prefixes)


def first_needed(kv_lens: Array, ratio: int, overlap: bool) -> Array:
    """The position of the first row that a raw state still needs, per request."""
    return jnp.maximum(kv_lens // ratio - int(overlap), 0) * ratio


def read_rows(
    kv: Array,
    score: Array,
    kv_tables: Array,
    score_tables: Array,
    kv_lens: Array,
    layer: Array,
    *,
    ratio: int,
    overlap: bool,
) -> tuple[Array, Array]:
    """The rows that a raw state of f32 still needs, and those behind them in the window."""
    first = first_needed(kv_lens, ratio, overlap)
    positions = first[:, None] + jnp.arange((1 + overlap) * ratio - 1, dtype=jnp.int32)[None]

    def rows_of(pool: Array, tables: Array) -> Array:
        pages, at = pool_of(pool, layer)
        if 0 in (pages.size, tables.size):
            return jnp.zeros((*positions.shape, pool.shape[-1]), jnp.float32)
        return pages.at[at.find_rows(tables, positions)].get(mode="fill", fill_value=0)

    return rows_of(kv, kv_tables), rows_of(score, score_tables)
