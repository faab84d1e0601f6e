"""The compressor's paged state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jax_dsv4 import _check, _config, _pytree

STATE_FORMATS = _config.STATE_FORMATS
# The leaves' names in a tree differ, for no checkpoint of one format to be restored into the other.
_LEAF_NAMES = {"raw": ("kv", "score"), "prefix": ("mean", "logsumexp")}
assert tuple(_LEAF_NAMES) == STATE_FORMATS


@_pytree.register(("kv", "score"), lambda state: _LEAF_NAMES.get(state.format, ("kv", "score")))
@dataclasses.dataclass(frozen=True)
class CompressorState:
    """The paged state of one compressor; a pytree whose ``format`` is static.

    Attributes:
      kv: ``[num_pages, page_size, S]``, bf16 or f32. Row ``p`` of a request is at page
        ``table[p // page_size]``, slot ``p % page_size``. All layers of a kind in one array:
        ``[layers, num_pages, page_size, S]``.
      score: the same shape and dtype; the gate's scores, position bias added.
      format: what a row holds. ``"raw"``: the token's own kv and score. ``"prefix"``, f32 only: of
        its window's rows up to this one, per channel, the logsumexp of the scores (in ``score``)
        and the mean of kv weighted by their softmax (in ``kv``); -inf and 0 where there are none.
        As static metadata: states of different formats do not mix in a scan, a cond or a compiled
        program; and as names of the leaves, ``kv`` and ``score`` or ``mean`` and ``logsumexp``:
        nor in a checkpoint.
    """

    kv: Any
    score: Any
    format: str = "raw"


def init_state(
    num_pages: int,
    page_size: int,
    *,
    head_dim: int,
    compress_ratio: int,
    overlap: bool | None = None,
    layers: int | None = None,
    dtype: DTypeLike = jnp.float32,
    format: str = "raw",
) -> CompressorState:
    """An empty state, in either format: kv 0, score -inf (rows never written weigh nothing).

    Args:
      num_pages: pages in the pool, of each layer.
      page_size: rows (tokens) per page, at least 1.
      head_dim: D, channels of a compressed value.
      compress_ratio: R, tokens per record.
      overlap: whether windows overlap (then S = 2 D, else S = D); ``None``: those of ratio 4 do.
      layers: make one state of so many layers, for calls that name a ``layer``.
      dtype: of both arrays, bf16 or f32; format ``"prefix"`` is f32 only.
      format: a member of ``STATE_FORMATS``.

    Returns:
      A ``CompressorState`` of two ``[(layers,) num_pages, page_size, S]`` arrays.

    Raises:
      ValueError, TypeError: an argument is none of the above; the text names it.
    """
    _check.choice("format", format, STATE_FORMATS)
    _check.state_dtype("dtype", format, dtype)
    _, overlap = _check.ratio_and_overlap(compress_ratio, overlap)
    shape = (
        _check.integer("num_pages", num_pages, 0),
        _check.integer("page_size", page_size, 1),
        _check.integer("head_dim", head_dim, 1) * (1 + overlap),
    )
    if layers is not None:
        shape = (_check.integer("layers", layers, 0), *shape)
    _check.array_size("layers, num_pages, page_size, head_dim", shape, dtype)
    return CompressorState(jnp.zeros(shape, dtype), jnp.full(shape, -jnp.inf, dtype), format)


def check_state(state: Any, *, overlap: bool, layers: bool) -> tuple[Array, Array]:
    """Its kv and score, of the dtypes and shapes that its format, windows and layers allow."""
    if not isinstance(state, CompressorState):
        raise TypeError(f"state: expected a CompressorState, got {type(state).__name__}")
    _check.choice("state.format", state.format, STATE_FORMATS)
    if hasattr(state.kv, "shape") and len(state.kv.shape) == 4 - layers:
        remedy = (
            "layer=None is for a state of one" if layers else "name one of its layers: layer=..."
        )
        raise ValueError(
            f"layer: expected a state {'of' if layers else 'without'} layers, got state.kv of "
            f"shape {list(state.kv.shape)}; {remedy}"
        )
    dims = ("layers",) * layers + ("num_pages", "page_size", "S")
    kv = _check.array("state.kv", state.kv, _check.FLOATS, *dims)
    _check.state_dtype("state.kv", state.format, kv.dtype)
    score = _check.array("state.score", state.score, (kv.dtype.name,), *kv.shape)
    page_size, state_dim = kv.shape[-2:]
    if page_size < 1:
        raise ValueError("state: expected a page_size of at least 1, got 0")
    if state_dim < 1 or (overlap and state_dim % 2):
        raise ValueError(
            f"state: expected S = 2 D of overlapping windows, or S = D, got {state_dim}"
        )
    return kv, score
