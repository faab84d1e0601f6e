"""Whole compressors: a decode step that ends in records."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_dsv4 import _check, _pytree
from jax_dsv4.decode import paged_kv_compress
from jax_dsv4.records import (
    RecordCache,
    check_record_options,
    check_records,
    store_records,
)
from jax_dsv4.state import CompressorState, check_state
from jax_dsv4.windows import completed_windows


@_pytree.register(
    ("ape", "norm_weight", "cos_sin_cache"), lambda _: ("ape", "norm_weight", "cos_sin_cache")
)
@dataclasses.dataclass(frozen=True)
class Compressor:
    """What a layer's compressor is; a pytree whose arrays are never written.

    Attributes:
      ape: ``[R, S]`` f32, bias added to the scores by position inside the window, or ``None``.
      norm_weight: ``[D]`` f32, weight of the records' RMSNorm, or ``None``: no norm.
      cos_sin_cache: ``[max_position, 64]`` f32, the engine's table, or ``None``: no rotation.
      head_dim: D, channels of a record.
      compress_ratio: R, tokens of a record.
      overlap: whether windows overlap (then S = 2 D, else S = D); ``None``: those of ratio 4 do.
      rms_norm_eps, rope_layout, hadamard, rounding: as in ``store_records``.

    Raises:
      ValueError, TypeError: a static field is none of the above; the text names it.
    """

    ape: Any
    norm_weight: Any
    cos_sin_cache: Any
    head_dim: int
    compress_ratio: int
    overlap: bool | None = None
    rms_norm_eps: float = 1e-6
    rope_layout: str = "halves"
    hadamard: bool = False
    rounding: str | None = None

    def __post_init__(self) -> None:
        """Check the static fields, and put each in one form."""
        ratio, overlap = _check.ratio_and_overlap(self.compress_ratio, self.overlap)
        checked = check_record_options(
            self.rms_norm_eps, self.rope_layout, self.hadamard, self.rounding
        )
        checked |= {"compress_ratio": ratio, "overlap": overlap}
        checked["head_dim"] = _check.integer("head_dim", self.head_dim, 1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def state_dim(self) -> int:
        """S, channels of a row of the state."""
        return self.head_dim * (1 + bool(self.overlap))


@_pytree.register(("state", "records"), lambda _: ("state", "records"))
@dataclasses.dataclass(frozen=True)
class CompressorCache:
    """What a compressor keeps; a pytree, updated in place where it is donated.

    Attributes:
      state: a ``CompressorState``.
      records: a ``RecordCache``.
    """

    state: CompressorState
    records: RecordCache


@_pytree.register(("state", "records"), lambda _: ("state", "records"))
@dataclasses.dataclass(frozen=True)
class CacheTables:
    """The block tables of a compressor's cache; a pytree.

    Attributes:
      state: ``[B, max_pages]`` i32, pages of the state; or a pair, as in ``paged_kv_compress``.
      records: ``[B, max_record_pages]`` i32, pages of the records: window w of request b is in row
        ``w % page_size`` of page ``records[b, w // page_size]``.
    """

    state: Any
    records: Any


def decode_records(
    kv_score: Any,
    compressor: Compressor | tuple[Compressor, ...],
    cache: CompressorCache | tuple[CompressorCache, ...],
    tables: CacheTables | tuple[CacheTables, ...],
    kv_lens: ArrayLike,
    *,
    layer: int | ArrayLike | None = None,
    q_lens: ArrayLike | None = None,
    implementation: str | None = None,
) -> Any:
    """One decode step of whole compressors: from projections to stored records.

    ``paged_kv_compress``, whose values stay in f32, and ``store_records`` of the windows that the
    step completes. A step that completes none writes no byte of the record cache.

    Args:
      kv_score: ``[B, next_n, 2 S]`` bf16 or f32, or a pair of ``[B, next_n, S]``, as in
        ``paged_kv_compress``. For several compressors: one array of all their columns, in their
        order, or a tuple of the above.
      compressor: a ``Compressor``; or a tuple of those that see the same requests, as a layer's
        main compressor and its indexer's.
      cache: its ``CompressorCache``; a tuple of as many. Donate it.
      tables: its ``CacheTables``; a tuple of as many.
      kv_lens, q_lens, implementation: as in ``paged_kv_compress``.
      layer: which layer of state and records the step works on, as there.

    Returns:
      The cache; a tuple of as many. A record whose page does not exist, whose window is past the
      table of pages, or whose position is past ``cos_sin_cache``, is not stored.

    Raises:
      ValueError, TypeError: at trace time, for a wrong shape, dtype or choice; the text names the
        argument.
      NotImplementedError: when differentiated.

    vmap: as in ``paged_kv_compress``: the cache is written, so an unmapped one is copied per index.

    Each compressor is two launches for now, and a little integer arithmetic between them.
    """
    if not isinstance(compressor, tuple):
        return _decode(kv_score, compressor, cache, tables, kv_lens, layer, q_lens, implementation)
    count = len(compressor)
    for name, x in (("cache", cache), ("tables", tables)):
        if not isinstance(x, tuple) or len(x) != count:
            got = len(x) if isinstance(x, tuple) else type(x).__name__
            raise ValueError(f"{name}: expected a tuple of {count}, as compressor is, got {got}")
    assert isinstance(cache, tuple) and isinstance(tables, tuple)
    rows = _split(kv_score, compressor)
    return tuple(
        _decode(new, c, own, pages, kv_lens, layer, q_lens, implementation)
        for new, c, own, pages in zip(rows, compressor, cache, tables, strict=True)
    )


def _split(kv_score: Any, compressors: tuple[Compressor, ...]) -> tuple[Any, ...]:
    """The new rows of each compressor."""
    for c in compressors:
        _check_type("compressor", c, Compressor)
    if isinstance(kv_score, tuple):
        if len(kv_score) != len(compressors):
            raise ValueError(
                f"kv_score: expected {len(compressors)} arrays, one for each compressor, got "
                f"{len(kv_score)}"
            )
        return kv_score
    widths = [2 * c.state_dim for c in compressors]
    rows = _check.array("kv_score", kv_score, _check.FLOATS, "B", "next_n", sum(widths))
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return tuple(rows[..., a : a + w] for a, w in zip(starts, widths, strict=True))


def _decode(
    kv_score: Any,
    compressor: Any,
    cache: Any,
    tables: Any,
    kv_lens: ArrayLike,
    layer: Any,
    q_lens: ArrayLike | None,
    implementation: str | None,
) -> CompressorCache:
    _check_type("compressor", compressor, Compressor)
    _check_type("cache", cache, CompressorCache)
    _check_type("tables", tables, CacheTables)
    c, records, has_layers = compressor, cache.records, layer is not None
    pool, kind = check_records(records, has_layers)
    if kind.head_dim != c.head_dim:
        raise ValueError(
            f"cache.records: expected head_dim {c.head_dim}, the compressor's, got {kind.head_dim}"
        )
    kv, _ = check_state(cache.state, overlap=c.overlap, layers=has_layers)
    if kv.shape[-1] != c.state_dim:
        raise ValueError(
            f"cache.state: expected S = {c.state_dim}, the compressor's, got {kv.shape[-1]}"
        )
    if has_layers and pool.shape[0] != kv.shape[0]:
        raise ValueError(
            f"cache.records: expected {kv.shape[0]} layers, as cache.state, got {pool.shape[0]}"
        )
    kinds = {"compress_ratio": c.compress_ratio, "overlap": c.overlap}
    values, state = paged_kv_compress(
        kv_score,
        c.ape,
        cache.state,
        tables.state,
        kv_lens,
        **kinds,
        layer=layer,
        q_lens=q_lens,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    next_n = jnp.shape(kv_score[0] if isinstance(kv_score, tuple) else kv_score)[1]
    windows = completed_windows(kv_lens, **kinds, next_n=next_n, q_lens=q_lens)
    records = store_records(
        values.reshape(-1, c.head_dim),
        _find_slots(tables.records, windows.window, records).reshape(-1),
        windows.position.reshape(-1),
        records,
        norm_weight=c.norm_weight,
        cos_sin_cache=c.cos_sin_cache,
        rms_norm_eps=c.rms_norm_eps,
        rope_layout=c.rope_layout,
        hadamard=c.hadamard,
        rounding=c.rounding,
        layer=layer,
        implementation=implementation,
    )
    return CompressorCache(state, records)


def _find_slots(tables: Any, window: Array, records: RecordCache) -> Array:
    """The slot of each window's record [B, M]; -1 where there is no window, or no page for it."""
    tables = _check.array("tables.records", tables, _check.I32, window.shape[0], "max_pages")
    num_pages, page_size = records.pool.shape[-2], records.page_size
    if isinstance(num_pages, int) and num_pages * page_size >= 2**31:
        raise ValueError("cache.records: expected fewer than 2^31 records in a layer")
    if 0 in tables.shape:
        return jnp.full(window.shape, -1, jnp.int32)
    logical = window // page_size
    page = jnp.take_along_axis(tables, jnp.clip(logical, 0, tables.shape[1] - 1), axis=1)
    exists = (window >= 0) & (logical < tables.shape[1]) & (page >= 0) & (page < num_pages)
    return jnp.where(exists, page * page_size + window % page_size, -1)


def _check_type(name: str, x: Any, expected: type) -> None:
    if not isinstance(x, expected):
        raise TypeError(f"{name}: expected a {expected.__name__}, got {type(x).__name__}")
