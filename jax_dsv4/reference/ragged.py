"""Ragged batches in plain jnp."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jax_dsv4.reference.decode import merge, softmax_mean
from jax_dsv4.reference.paging import Pool, pool_of


class Requests(NamedTuple):
    """Whose rows are whose, of a ragged batch of T rows; each ``[B]`` i32."""

    begin: Array  # the first new row of each; never less than that of the one before
    end: Array  # behind its last one
    length: Array  # 0 where there is no such request, or it is inactive

    @property
    def start(self) -> Array:
        """The position of the first new row that counts."""
        return jnp.maximum(self.length - (self.end - self.begin), 0)

    def owners(self, num_rows: int) -> Array:
        """The request that each row belongs to, if any: ``len(begin)`` behind the last one's."""
        row = jnp.arange(num_rows, dtype=jnp.int32)
        return jnp.searchsorted(self.end, row, side="right").astype(jnp.int32)

    def windows(self, num_rows: int, ratio: int) -> tuple[Array, Array]:
        """The request and the window of each row of ``kv_comp`` [T // R + B]; -1 for none."""
        batch = self.begin.shape[0]
        slot = jnp.arange(num_rows // ratio + batch, dtype=jnp.int32)
        if batch == 0:
            return jnp.full_like(slot, -1), jnp.full_like(slot, -1)
        first_slot = self.begin // ratio + jnp.arange(batch, dtype=jnp.int32)
        request = jnp.searchsorted(first_slot, slot, side="right").astype(jnp.int32) - 1
        at = jnp.maximum(request, 0)
        window = self.start[at] // ratio + slot - first_slot[at]
        exists = (request >= 0) & (window < self.length[at] // ratio)
        return jnp.where(exists, request, -1), jnp.where(exists, window, -1)


def requests_of(cu_q_lens: Array, kv_lens: Array, num_seqs: Array, num_rows: int) -> Requests:
    """The requests of a batch of ``num_rows`` rows; ``num_seqs`` [1], or [0]: all are there."""
    ends = jax.lax.cummax(jnp.clip(cu_q_lens, 0, num_rows))
    begin, end = ends[:-1], ends[1:]
    active = (kv_lens > 0) & (begin < end)
    if num_seqs.size:
        active &= jnp.arange(kv_lens.shape[0], dtype=jnp.int32) < num_seqs
    return Requests(begin, end, jnp.where(active, kv_lens, 0))


def is_stored(
    positions: Array,
    lengths: Array,
    *,
    ratio: int,
    overlap: bool,
    state_format: str,
    max_rewind: int,
    resume_every: int,
) -> Array | bool:
    """Whether the new rows at ``positions`` of requests of ``lengths`` are: see ``ffi/ragged.h``.

    ``max_rewind`` -1: all are; ``resume_every`` 0: there is none. No sum here passes int32.
    """
    if max_rewind < 0:
        return True
    ends_window = positions % ratio == ratio - 1
    if state_format == "raw":

        def reads(start: Array) -> Array:  # whether a step that starts there does
            return positions >= (start // ratio - int(overlap)) * ratio
    else:

        def reads(start: Array) -> Array:
            return positions >= start - jnp.where(ends_window, ratio, 1)

    stored = reads(jnp.maximum(lengths - max_rewind, 0))
    if resume_every:
        before = positions - positions % resume_every  # the multiple that is next lies behind
        stored |= (before <= lengths - resume_every) & reads(before + resume_every)
    return stored if overlap else stored & ~ends_window


@partial(
    jax.jit,
    static_argnames=(
        *("compress_ratio", "overlap", "state_format", "out_dtype"),
        *("max_rewind", "resume_every"),
    ),
)
def ragged_kv_compress(
    kv_score: Array,
    new_score: Array,
    ape: Array,
    kv: Array,
    score: Array,
    kv_tables: Array,
    score_tables: Array,
    kv_lens: Array,
    cu_q_lens: Array,
    num_seqs: Array,
    layer: Array,
    *,
    compress_ratio: int,
    overlap: bool,
    state_format: str,
    out_dtype: DTypeLike,
    max_rewind: int,
    resume_every: int,
) -> tuple[Array, Array, Array]:
    """A ragged batch -> (kv_comp, kv, score); operands in the order of the custom call.

    Shapes as in ``jax_dsv4.ragged_kv_compress``, and empty arrays for what is not given. Old rows
    are read from the state as it came: a new row may take the place of one of them.
    """
    ratio, states = compress_ratio, (kv, score)
    num_rows, batch = kv_score.shape[0], kv_lens.shape[0]
    state_dim = kv.shape[-1]
    head_dim = state_dim // 2 if overlap else state_dim
    if 0 in (num_rows, batch):
        num_windows = num_rows // ratio + batch
        return jnp.zeros((num_windows, head_dim), out_dtype), *states
    num_layers = kv.shape[0]
    if 0 in (kv.size, kv_tables.shape[1]):  # every page is nowhere, and jnp gathers none
        kv = score = jnp.zeros((1, 1, state_dim), kv.dtype)
        pool = Pool(0, 0, 1, 1)
        kv_tables = score_tables = jnp.full((batch, 1), -1, jnp.int32)
    else:
        kv, pool = pool_of(kv, layer)
        score, _ = pool_of(score, layer)

    requests = requests_of(cu_q_lens, kv_lens, num_seqs, num_rows)
    if layer.size:
        exists = (layer >= 0) & (layer < num_layers)
        requests = requests._replace(length=jnp.where(exists, requests.length, 0))
    start = requests.start

    def find(request: Array, positions: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Where the rows at ``positions`` are, of kv and of score."""
        return (
            pool.find_rows_of(kv_tables, request, positions),
            pool.find_rows_of(score_tables, request, positions),
        )

    def exist(places: tuple[tuple[Array, Array], tuple[Array, Array]]) -> Array:
        (kv_page, _), (score_page, _) = places
        return (kv_page < pool.nowhere) & (score_page < pool.nowhere)

    # The new rows, their positions, and their places in the state; -1 and nowhere for padding.
    owner = requests.owners(num_rows)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    of_one = (owner < batch) & (row >= requests.begin[0])
    owner = jnp.minimum(owner, batch - 1)
    length = requests.length[owner]
    positions = jnp.where(of_one & (length > 0), length - (requests.end[owner] - row), -1)
    parts = (kv_score, new_score) if new_score.size else jnp.split(kv_score, 2, axis=-1)
    new_kv, new_score = (x.astype(jnp.float32) for x in parts)
    if ape.size:
        new_score += ape[positions % ratio]
    places = find(owner, positions)
    counts = exist(places) if max_rewind < 0 else jnp.ones(num_rows, bool)
    rule = {"max_rewind": max_rewind, "resume_every": resume_every}
    kind = {"ratio": ratio, "overlap": overlap, "state_format": state_format}
    stored = is_stored(positions, length, **kind, **rule)

    def read(request: Array, positions: Array, columns: slice) -> tuple[Array, Array]:
        """Old rows in f32, 0 and -inf where nowhere. [*positions, columns]"""
        places = find(request, positions)
        there = exist(places)[..., None]
        rows = (x[(*at, columns)] for x, at in zip((kv, score), places, strict=True))
        rows = (x.astype(jnp.float32) for x in rows)
        return tuple(jnp.where(there, x, none) for x, none in zip(rows, (0, -jnp.inf), strict=True))

    def write(new_kv: Array, new_score: Array) -> tuple[Array, Array]:
        written = []
        for x, (page, slot), new, state in zip(
            (kv, score), places, (new_kv, new_score), states, strict=True
        ):
            if not state.size or not kv_tables.shape[1]:
                written.append(state)
                continue
            page = jnp.where(stored, page, pool.nowhere)
            pages = x.at[page, slot].set(new.astype(x.dtype), mode="drop")
            written.append(pages.reshape(state.shape))
        return written[0], written[1]

    # The windows that this call completes.
    request, window = requests.windows(num_rows, ratio)
    completed = window >= 0
    request = jnp.maximum(request, 0)
    first_new, first_row = start[request], requests.end[request] - requests.length[request]

    # What a window contributes to the next one's value, and to its own.
    to_next, to_own = slice(head_dim), slice(-head_dim, None)

    def new_or_old(new: tuple[Array, Array], positions: Array, columns: slice):
        """The rows at ``positions`` of each window's request; 0 and -inf below 0."""
        shape = (positions.shape[0], *[1] * (positions.ndim - 1))
        is_new = positions >= first_new.reshape(shape)
        at = jnp.where(is_new, first_row.reshape(shape) + positions, 0)
        old = read(
            jnp.broadcast_to(request.reshape(shape), positions.shape),
            jnp.where(is_new, -1, positions),
            columns,
        )
        return tuple(
            jnp.where(is_new[..., None], x[:, columns][at], y)
            for x, y in zip(new, old, strict=True)
        )

    if state_format == "raw":
        kv_after, score_after = write(new_kv, new_score)
        new = _as_stored(new_kv, kv.dtype), _as_stored(new_score, kv.dtype)
        new = new[0], jnp.where(counts[:, None], new[1], -jnp.inf)
        new = jnp.where(counts[:, None], new[0], 0), new[1]

        def rows_of(window: Array, columns: slice) -> tuple[Array, Array]:
            positions = window[:, None] * ratio + jnp.arange(ratio, dtype=jnp.int32)[None]
            needed = (completed & (window >= 0))[:, None]
            return new_or_old(new, jnp.where(needed, positions, -1), columns)

        rows = rows_of(window, to_own)
        if overlap:
            before = rows_of(window - 1, to_next)
            rows = tuple(jnp.concatenate(both, axis=1) for both in zip(before, rows, strict=True))
        value = softmax_mean(*rows)
    else:
        # The prefix after each new row; that before the request's first is merged last.
        offset = positions % ratio
        first_offset = jnp.maximum(positions - start[owner], 0)
        prefixes = _scan_windows(
            jnp.where(counts[:, None] & (new_score > -jnp.inf), new_kv, 0),
            jnp.where(counts[:, None], new_score, -jnp.inf),
            jnp.minimum(offset, first_offset),
            ratio,
        )
        batch_index = jnp.arange(batch, dtype=jnp.int32)
        continues = start % ratio > 0
        before = read(batch_index, jnp.where(continues, start - 1, -1), slice(None))
        in_first = (first_offset < offset)[:, None]
        mean, lse = (x[owner] for x in before)
        mean, lse = merge(
            (jnp.where(in_first, mean, 0), jnp.where(in_first, lse, -jnp.inf)), prefixes
        )
        kv_after, score_after = write(mean, lse)

        def last_of(window: Array, columns: slice) -> tuple[Array, Array]:
            position = jnp.where(completed & (window >= 0), (window + 1) * ratio - 1, -1)
            return new_or_old((mean, lse), position, columns)

        value, lse_of_value = last_of(window, to_own)
        if overlap:
            value, lse_of_value = merge(last_of(window - 1, to_next), (value, lse_of_value))
        value = jnp.where(lse_of_value == -jnp.inf, 0, value)
    kv_comp = jnp.where(completed[:, None], value, 0).astype(out_dtype)
    return kv_comp, kv_after, score_after


def _as_stored(x: Array, dtype: DTypeLike) -> Array:
    """``x`` rounded to the state's dtype, still in f32: a cast there and back XLA may leave out."""
    bits = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)


def _scan_windows(mean: Array, lse: Array, before: Array, ratio: int) -> tuple[Array, Array]:
    """The prefixes after each row [T, S], of itself and so many rows ``before`` it, below R.

    In log2 R rounds: after each, a row holds twice as many.
    """
    distance = 1
    while distance < ratio:
        zero = jnp.zeros((), mean.dtype)
        earlier = tuple(
            jax.lax.pad(x, zero, ((distance, -distance, 0), (0, 0, 0))) for x in (mean, lse)
        )
        has_earlier = (before >= distance)[:, None]
        merged = merge(earlier, (mean, lse))
        mean, lse = (
            jnp.where(has_earlier, x, own) for x, own in zip(merged, (mean, lse), strict=True)
        )
        distance *= 2
    return mean, lse
