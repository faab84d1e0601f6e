"""Ragged batches in plain jnp."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_dsv4.reference.decode import merge, softmax_mean
from jax_dsv4.reference.paging import Pool, pool_of

_Rows = tuple[Array, Array]  # kv and score, or mean and logsumexp
_Place = tuple[Array, Array]  # page and slot
_NONE = (0, -jnp.inf)  # the rows that weigh nothing


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
        return _count_up_to(jnp.arange(num_rows, dtype=jnp.int32), self.end)

    def windows(self, num_rows: int, ratio: int) -> tuple[Array, Array]:
        """The request and the window of each row of ``kv_comp`` [T // R + B]; -1 for none."""
        batch = self.begin.shape[0]
        slot = jnp.arange(num_rows // ratio + batch, dtype=jnp.int32)
        if batch == 0:
            return jnp.full_like(slot, -1), jnp.full_like(slot, -1)
        first_slot = self.begin // ratio + jnp.arange(batch, dtype=jnp.int32)
        request = _count_up_to(slot, first_slot) - 1
        at = jnp.maximum(request, 0)
        window = self.start[at] // ratio + slot - first_slot[at]
        exists = (request >= 0) & (window < self.length[at] // ratio)
        return jnp.where(exists, request, -1), jnp.where(exists, window, -1)


def _count_up_to(x: Array, others: Array) -> Array:
    """How many of ``others`` are not above each of ``x``; also of symbolic numbers of them."""
    return jnp.sum(others[None] <= x[:, None], axis=1, dtype=jnp.int32)


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
    ratio, given = compress_ratio, (kv, score)
    num_rows, batch = kv_score.shape[0], kv_lens.shape[0]
    state_dim = kv.shape[-1]
    head_dim = state_dim // 2 if overlap else state_dim
    if 0 in (num_rows, batch):
        num_windows = num_rows // ratio + batch
        return jnp.zeros((num_windows, head_dim), out_dtype), *given
    num_layers = kv.shape[0]
    nothing_there = 0 in (kv.size, kv_tables.shape[1])
    if nothing_there:  # every page is nowhere, and jnp gathers none
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

    def find(request: Array, positions: Array) -> tuple[_Place, _Place, Array]:
        """Where the rows at ``positions`` are, of kv and of score; and whether both are there."""
        kv_at = pool.find_rows_of(kv_tables, request, positions)
        score_at = pool.find_rows_of(score_tables, request, positions)
        return kv_at, score_at, (kv_at[0] < pool.nowhere) & (score_at[0] < pool.nowhere)

    # The new rows, their positions, and their places in the state; -1 and nowhere for padding.
    row = jnp.arange(num_rows, dtype=jnp.int32)
    owner = requests.owners(num_rows)
    of_one = (owner < batch) & (row >= requests.begin[0])
    owner = jnp.minimum(owner, batch - 1)
    length = requests.length[owner]
    positions = jnp.where(of_one & (length > 0), length - (requests.end[owner] - row), -1)
    parts = (kv_score, new_score) if new_score.size else jnp.split(kv_score, 2, axis=-1)
    new_kv, new_score = (x.astype(jnp.float32) for x in parts)
    if ape.size:
        new_score += ape[positions % ratio]
    kv_at, score_at, exists = find(owner, positions)
    new = (new_kv, new_score)
    if max_rewind < 0:  # a row that is nowhere is left out
        new = _where(exists, new)
    stored = is_stored(
        positions,
        length,
        ratio=ratio,
        overlap=overlap,
        state_format=state_format,
        max_rewind=max_rewind,
        resume_every=resume_every,
    )

    def write(new_kv: Array, new_score: Array) -> _Rows:
        (kv_page, kv_slot), (score_page, score_slot) = kv_at, score_at
        kv_page = jnp.where(stored, kv_page, pool.nowhere)
        score_page = jnp.where(stored, score_page, pool.nowhere)
        return (
            kv.at[kv_page, kv_slot].set(new_kv.astype(kv.dtype), mode="drop"),
            score.at[score_page, score_slot].set(new_score.astype(kv.dtype), mode="drop"),
        )

    def read(request: Array, positions: Array, columns: slice = slice(None)) -> _Rows:
        """Rows of the state in f32, 0 and -inf where nowhere. [*positions, columns]"""
        kv_at, score_at, exists = find(request, positions)
        rows = kv[(*kv_at, columns)], score[(*score_at, columns)]
        return _where(exists, (rows[0].astype(jnp.float32), rows[1].astype(jnp.float32)))

    # The windows that this call completes.
    request, window = requests.windows(num_rows, ratio)
    completed = window >= 0
    request = jnp.maximum(request, 0)
    # What a window contributes to the next one's value, and to its own.
    to_next, to_own = slice(head_dim), slice(-head_dim, None)

    def rows_at(positions: Array, new: _Rows, columns: slice) -> _Rows:
        """Those at ``positions`` [windows, any] of the windows' requests, new ones from ``new``."""
        of = jnp.broadcast_to(request[:, None], positions.shape)
        is_new = positions >= start[of]
        at = jnp.where(is_new, requests.end[of] - (requests.length[of] - positions), 0)
        old = read(of, jnp.where(is_new, -1, positions), columns)
        return _where(is_new, (new[0][:, columns][at], new[1][:, columns][at]), old)

    def from_window(window: Array, offsets: Array) -> Array:
        """The positions so far into windows; -1 for those that there are not."""
        needed = (completed & (window >= 0))[:, None]
        return jnp.where(needed, window[:, None] * ratio + offsets[None], -1)

    if state_format == "raw":
        states = write(new_kv, new_score)
        new = _as_stored(new[0], kv.dtype), _as_stored(new[1], kv.dtype)
        offsets = jnp.arange(ratio, dtype=jnp.int32)
        kv_rows, score_rows = rows_at(from_window(window, offsets), new, to_own)
        if overlap:
            before = rows_at(from_window(window - 1, offsets), new, to_next)
            kv_rows = jnp.concatenate((before[0], kv_rows), axis=1)
            score_rows = jnp.concatenate((before[1], score_rows), axis=1)
        value = softmax_mean(kv_rows, score_rows)
    else:
        # The prefix after each new row, of new rows only; then that before the request's first.
        into_window, into_request = positions % ratio, jnp.maximum(positions - start[owner], 0)
        mean = jnp.where(new[1] > -jnp.inf, new[0], 0)
        prefixes = _scan_windows((mean, new[1]), jnp.minimum(into_window, into_request), ratio)
        continued = jnp.where(start % ratio > 0, start - 1, -1)
        mean, lse = read(jnp.arange(batch, dtype=jnp.int32), continued)
        before = _where(into_request < into_window, (mean[owner], lse[owner]))
        prefixes = merge(before, prefixes)
        states = write(*prefixes)
        last = jnp.full(1, ratio - 1, jnp.int32)
        mean, lse = rows_at(from_window(window, last), prefixes, to_own)
        if overlap:
            before = rows_at(from_window(window - 1, last), prefixes, to_next)
            mean, lse = merge(before, (mean, lse))
        value = jnp.where(lse == -jnp.inf, 0, mean)[:, 0]
    kv_comp = jnp.where(completed[:, None], value, 0).astype(out_dtype)
    if nothing_there:
        return kv_comp, *given
    return kv_comp, states[0].reshape(given[0].shape), states[1].reshape(given[0].shape)


def _where(condition: Array, rows: _Rows, others: tuple[ArrayLike, ArrayLike] = _NONE) -> _Rows:
    """``rows`` where the condition holds, which has no channels; elsewhere the others."""
    condition = condition[..., None]
    return jnp.where(condition, rows[0], others[0]), jnp.where(condition, rows[1], others[1])


def _as_stored(x: Array, dtype: DTypeLike) -> Array:
    """``x`` rounded to the state's dtype, still in f32: a cast there and back XLA may leave out."""
    bits = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)


def _scan_windows(rows: _Rows, before: Array, ratio: int) -> _Rows:
    """The prefixes after each row [T, S], of itself and so many rows ``before`` it, below R.

    In log2 R rounds: after each, a row holds twice as many.
    """
    distance, zero = 1, jnp.zeros((), jnp.float32)
    while distance < ratio:
        by = ((distance, -distance, 0), (0, 0, 0))
        earlier = jax.lax.pad(rows[0], zero, by), jax.lax.pad(rows[1], zero, by)
        rows = _where(before >= distance, merge(earlier, rows), rows)
        distance *= 2
    return rows
