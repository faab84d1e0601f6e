"""The compressor's paged state, and small helpers about windows."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_dsv4 import _config

STATE_FORMATS = _config.STATE_FORMATS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressorState:
    """The paged state of one compressor; a pytree whose ``format`` is static.

    Attributes:
      kv: ``[num_pages, page_size, S]``, bf16 or f32. Row ``p`` of a request is at page
        ``table[p // page_size]``, slot ``p % page_size``.
      score: the same shape and dtype; the gate's scores, position bias added.
      format: what a row holds. ``"raw"``: the token's own kv and score. ``"prefix"``, f32 only: of
        its window's rows up to this one, per channel, the logsumexp of the scores (in ``score``)
        and the mean of kv weighted by their softmax (in ``kv``); -inf and 0 where there are none.
        As static metadata: states of different formats do not mix in a scan, a cond or a compiled
        program.
    """

    kv: Any
    score: Any
    format: str = dataclasses.field(default="raw", metadata={"static": True})


# A program with a state among its arguments can be serialized: by its static fields, the format.
jax.export.register_pytree_node_serialization(
    CompressorState,
    serialized_name="jax_dsv4.CompressorState",
    serialize_auxdata=lambda aux: json.dumps(aux).encode(),
    deserialize_auxdata=lambda data: tuple(json.loads(data)),
)


def init_state(
    num_pages: int,
    page_size: int,
    *,
    head_dim: int,
    compress_ratio: int,
    dtype: DTypeLike = jnp.float32,
    format: str = "raw",
) -> CompressorState:
    """An empty state, in either format: kv 0, score -inf (rows never written weigh nothing).

    Args:
      num_pages: pages in the pool.
      page_size: rows (tokens) per page, at least 1.
      head_dim: D, channels of a compressed value.
      compress_ratio: R, tokens per record; 4 (overlapping windows, S = 2 D) or 128 (S = D).
      dtype: of both arrays, bf16 or f32; format ``"prefix"`` is f32 only.
      format: a member of ``STATE_FORMATS``.

    Returns:
      A ``CompressorState`` of two ``[num_pages, page_size, S]`` arrays.

    Raises:
      ValueError, TypeError: an argument is none of the above; the text names it.
    """
    _config.check_format("format", format)
    if num_pages < 0 or page_size < 1:
        raise ValueError(
            "num_pages, page_size: expected at least 0 and at least 1, "
            f"got {num_pages} and {page_size}"
        )
    if head_dim < 1:
        raise ValueError(f"head_dim: expected at least 1, got {head_dim}")
    _config.check_state_dtype("dtype", format, dtype)
    width = head_dim * (2 if _config.overlaps(compress_ratio) else 1)
    shape = (num_pages, page_size, width)
    return CompressorState(jnp.zeros(shape, dtype), jnp.full(shape, -jnp.inf, dtype), format)


def num_compressed(
    kv_lens: ArrayLike, *, compress_ratio: int, next_n: int, q_lens: ArrayLike | None = None
) -> jax.Array:
    """How many windows a step completes, per request: the rows of ``kv_comp`` that hold one.

    Args:
      kv_lens: ``[B]`` i32, sequence lengths including the new tokens.
      compress_ratio: R.
      next_n: the step's static number of rows per request.
      q_lens: ``[B]`` i32, how many of them are real; all by default.

    Returns:
      ``[B]`` i32, each between 0 and ``ceil(next_n / R)``; 0 for an inactive request.

    Raises:
      ValueError: for a ratio that no compressor has, or a ``next_n`` below 1.
    """
    _config.overlaps(compress_ratio)
    if next_n < 1:
        raise ValueError(f"next_n: expected at least 1, got {next_n}")
    kv_lens = jnp.asarray(kv_lens, jnp.int32)
    n = jnp.int32(next_n) if q_lens is None else jnp.minimum(jnp.asarray(q_lens, jnp.int32), next_n)
    active = (kv_lens > 0) & (n > 0)
    before = jnp.maximum(kv_lens - jnp.maximum(n, 0), 0) // compress_ratio
    return jnp.where(active, kv_lens // compress_ratio - before, 0)


def live_pages(
    length: int, page_size: int, *, compress_ratio: int, next_n: int, format: str = "raw"
) -> list[int]:
    """The logical pages of a request that its next step reads or writes: its others may be reused.

    In format ``"raw"``, those of the open window, where windows overlap of the window before it,
    and of the step's own rows. In format ``"prefix"``, those of the step's own rows, of the row
    before them unless it ends a window, and where windows overlap of the last row of the window
    before. No step from this length or from a greater one reads an earlier page that is not listed.

    Args:
      length: of the sequence before the step, without rejected drafts.
      page_size: rows per page.
      compress_ratio: R.
      next_n: how many rows the step brings.
      format: of the state.

    Returns:
      Indices into the request's block table, in ascending order.

    Raises:
      ValueError: an argument is out of range; the text names it.
    """
    _config.check_format("format", format)
    overlap = _config.overlaps(compress_ratio)
    for name, value, minimum in (("length", length, 0), ("page_size", page_size, 1)):
        if value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    if next_n < 1:
        raise ValueError(f"next_n: expected at least 1, got {next_n}")
    open_start, end = length // compress_ratio * compress_ratio, length + next_n
    if format == "raw":
        spans = [(max(open_start - overlap * compress_ratio, 0), end)]
    else:
        spans = [(max(length - 1, open_start), end)]
        if overlap and open_start > 0:
            spans.append((open_start - 1, open_start))
    return sorted({p for a, b in spans for p in range(a // page_size, (b - 1) // page_size + 1)})


def pages_needed(page_size: int, *, compress_ratio: int, next_n: int, format: str = "raw") -> int:
    """The most pages that one request has live (``live_pages``) at a time, however long it is.

    A pool of so many pages per slot never runs out.

    Args:
      page_size: rows per page.
      compress_ratio: R.
      next_n: the most rows that a step brings per request.
      format: of the state.

    Raises:
      ValueError: an argument is out of range; the text names it.
    """
    options = {"compress_ratio": compress_ratio, "next_n": next_n, "format": format}
    _config.overlaps(compress_ratio)
    period = math.lcm(compress_ratio, max(page_size, 1))  # every alignment of windows and pages
    return max(len(live_pages(period + i, page_size, **options)) for i in range(period))


def layer_tables(
    block_tables: ArrayLike | tuple[ArrayLike, ArrayLike], layer: ArrayLike, *, num_pages: int
) -> Any:
    """Block tables of one layer in a pool that stacks layers, for a ``lax.scan`` over layers.

    A carry of arrays ``[layers * num_pages, page_size, S]`` is updated in place; arrays
    ``[layers, num_pages, page_size, S]``, indexed by layer or scanned over, would be copied.

    Args:
      block_tables: ``[B, max_pages]`` i32, page ids within one layer, or a pair of such tables.
      layer: scalar i32.
      num_pages: pages of one layer.

    Returns:
      The table, or the pair, with ids within the whole pool; an id that is not in
      ``[0, num_pages)`` becomes -1, rather than a page of another layer.
    """

    def offset(table):
        table = jnp.asarray(table)
        exists = (table >= 0) & (table < num_pages)
        return jnp.where(exists, table + jnp.int32(layer) * num_pages, -1)

    return jax.tree.map(offset, block_tables)
