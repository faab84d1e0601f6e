"""The compressor's paged state, and small helpers about windows."""

from __future__ import annotations

import dataclasses
import json
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
      format: what a row holds. ``"raw"``: the token's own kv and score.
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
    """An empty state: kv 0, score -inf (rows never written weigh nothing).

    Args:
      num_pages: pages in the pool.
      page_size: rows (tokens) per page, at least 1.
      head_dim: D, channels of a compressed value.
      compress_ratio: R, tokens per record; 4 (overlapping windows, S = 2 D) or 128 (S = D).
      dtype: of both arrays, bf16 or f32.
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
