"""Which windows a call completes: for what an engine does with the rows of ``kv_comp``."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_dsv4 import _check, _pytree
from jax_dsv4.reference.ragged import requests_of


@_pytree.register_tuple
class CompletedWindows(NamedTuple):
    """What the rows of ``kv_comp`` hold; three arrays ``[B, M]``, ``M = ceil(next_n / R)``.

    Attributes:
      window: i32, the window that the row holds, which is also the index of its record in the
        request's sequence of records; -1 where the row holds none.
      valid: bool, whether the row holds a window. Valid rows come first, oldest window first.
      position: i32, ``window * R``: the position of the window's first token, at which the
        record's rotary embedding is taken; -1 where the row holds none.
    """

    window: Array
    valid: Array
    position: Array


def num_compressed(
    kv_lens: ArrayLike,
    *,
    compress_ratio: int,
    overlap: bool | None = None,
    next_n: int,
    q_lens: ArrayLike | None = None,
) -> Array:
    """How many windows a step completes, per request: the rows of ``kv_comp`` that hold one.

    Args:
      kv_lens: ``[B]`` i32, sequence lengths including the new tokens; 0 or less: inactive slot.
      compress_ratio: R.
      overlap: whether windows overlap. It changes no count: every helper takes it, so that one set
        of options serves them all.
      next_n: the step's static number of rows per request, at least 1.
      q_lens: ``[B]`` i32, how many of them are real; clamped to 0...next_n; default all.

    Returns:
      ``[B]`` i32, each between 0 and ``ceil(next_n / R)``; 0 for an inactive request.

    Raises:
      ValueError, TypeError: a wrong shape, value or dtype; the text names the argument.
    """
    ratio, _ = _check.ratio_and_overlap(compress_ratio, overlap)
    next_n = _check.integer("next_n", next_n, 1)
    return _first_and_count(kv_lens, ratio, next_n, q_lens)[1]


def completed_windows(
    kv_lens: ArrayLike,
    *,
    compress_ratio: int,
    overlap: bool | None = None,
    next_n: int,
    q_lens: ArrayLike | None = None,
) -> CompletedWindows:
    """Which window each row of ``kv_comp`` holds, and at which position to rotate its record.

    A window that a draft completes is listed even if that draft is rejected later. It is listed
    again by the step that completes it anew, and its record is then to be written again.

    Args:
      kv_lens, compress_ratio, overlap, next_n, q_lens: those of the step, as in
        ``num_compressed``.

    Returns:
      ``CompletedWindows(window, valid, position)``, three arrays ``[B, ceil(next_n / R)]``.

    Raises:
      ValueError, TypeError: a wrong shape, value or dtype; the text names the argument.
    """
    ratio, _ = _check.ratio_and_overlap(compress_ratio, overlap)
    next_n = _check.integer("next_n", next_n, 1)
    first, count = _first_and_count(kv_lens, ratio, next_n, q_lens)
    row = jnp.arange(-(-next_n // ratio), dtype=jnp.int32)[None]
    valid = row < count[:, None]
    window = jnp.where(valid, first[:, None] + row, -1)
    return CompletedWindows(window, valid, jnp.where(valid, window * ratio, -1))


@_pytree.register_tuple
class RaggedWindows(NamedTuple):
    """What the rows of a ragged batch's ``kv_comp`` hold; two arrays ``[T // R + B]`` i32.

    Attributes:
      request: the request whose window the row holds; -1 where it holds none.
      window: the window, which is also the index of its record in the request's sequence of
        records, and times R the position at which that is rotated; -1 where the row holds none.
    """

    request: Array
    window: Array


def ragged_windows(
    cu_q_lens: ArrayLike,
    kv_lens: ArrayLike,
    *,
    num_rows: int,
    compress_ratio: int,
    overlap: bool | None = None,
    num_seqs: ArrayLike | None = None,
) -> RaggedWindows:
    """Which request's window each row of ``kv_comp`` holds, of ``ragged_kv_compress``.

    Args:
      cu_q_lens, kv_lens, compress_ratio, num_seqs: those of the call.
      overlap: changes nothing, as in ``num_compressed``.
      num_rows: T, the number of rows of ``kv_score``: static, or a dimension of ``jax.export``.

    Returns:
      ``RaggedWindows(request, window)``.

    Raises:
      ValueError, TypeError: a wrong shape, value or dtype; the text names the argument.
    """
    ratio, _ = _check.ratio_and_overlap(compress_ratio, overlap)
    rows: Any = num_rows
    if not jax.export.is_symbolic_dim(num_rows):
        rows = _check.integer("num_rows", num_rows, 0)
    kv_lens, cu_q_lens, num_seqs = _check.ragged_batch(kv_lens, cu_q_lens, num_seqs)
    requests = requests_of(cu_q_lens, kv_lens, num_seqs, rows)
    return RaggedWindows(*requests.windows(rows, ratio))


def _first_and_count(
    kv_lens: ArrayLike, ratio: int, next_n: int, q_lens: ArrayLike | None
) -> tuple[Array, Array]:
    """The first window that each request's step may complete, and how many it completes."""
    lens = _check.array("kv_lens", kv_lens, _check.I32, "B")
    n = jnp.int32(next_n)
    if q_lens is not None:
        n = jnp.clip(_check.array("q_lens", q_lens, _check.I32, *lens.shape), 0, next_n)
    active = (lens > 0) & (n > 0)
    # Only an inactive request's subtraction can overflow.
    first = jnp.maximum(lens - n, 0) // ratio
    return first, jnp.where(active, lens // ratio - first, 0)
