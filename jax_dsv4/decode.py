"""The decode operation, public side: documentation, checks, operands."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_dsv4 import _config, _ffi
from jax_dsv4.state import CompressorState

IMPLEMENTATIONS = (None, "ffi", "xla")


def _array(name: str, x: Any, dtypes: tuple[str, ...], *shape: int | str) -> Array:
    """``x`` as an array of one of ``dtypes`` and this shape; a string: a dimension of any size."""
    try:
        array = x if hasattr(x, "dtype") and hasattr(x, "shape") else jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array, got {type(x).__name__}") from error
    # Before jnp.asarray, which makes 32 bits of NumPy's 64.
    if array.dtype.name not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(dtypes)}, got {array.dtype.name}")
    fits = len(array.shape) == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(array.shape)}")
    return jnp.asarray(array)


def paged_kv_compress(
    kv_score: ArrayLike,
    ape: ArrayLike | None,
    state: CompressorState,
    block_tables: ArrayLike | tuple[ArrayLike, ArrayLike],
    kv_lens: ArrayLike,
    *,
    compress_ratio: int,
    q_lens: ArrayLike | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> tuple[Array, CompressorState]:
    """One decode step of DeepSeek-V4's KV compressor on a paged state.

    Stores the new tokens' rows and, for each window of ``compress_ratio`` tokens that they
    complete, computes its compressed value: per channel, a softmax over the window's stored scores
    times its stored kv. With B requests, R = ``compress_ratio``, D channels per compressed value
    and S = 2 D where windows overlap (R = 4), D where they do not (R = 128):

    Args:
      kv_score: ``[B, next_n, 2 S]`` bf16 or f32, the new tokens' projections, kv then score.
        ``next_n`` is the static number of rows a step brings per request, at least 1.
      ape: ``[R, S]`` f32, bias added to the scores by position inside the window, or ``None``.
      state: ``CompressorState`` of two ``[num_pages, page_size, S]`` arrays, bf16 or f32. Donate it
        (``jax.jit(..., donate_argnums=...)``) and it is updated in place, without a copy.
      block_tables: ``[B, max_pages]`` i32, the page of each logical page of each request; or a pair
        ``(kv_tables, score_tables)``, one for each array of the state.
      kv_lens: ``[B]`` i32, sequence lengths including the new tokens; 0 or less: inactive slot.
      compress_ratio: R, 4 (overlapping windows) or 128.
      q_lens: ``[B]`` i32, how many rows of ``kv_score`` are real, left-aligned; clamped to
        0...next_n; default all. 0: inactive slot.
      out_dtype: of ``kv_comp``, bf16 or f32.
      implementation: ``None``: the compiled kernel on CPU and CUDA, the jnp reference elsewhere;
        ``"ffi"``: the compiled kernel; ``"xla"``: the jnp reference, for any D.

    Returns:
      ``(kv_comp, state)``. ``kv_comp`` is ``[B, ceil(next_n / R), D]``: the values of the windows
      completed in this step, oldest first; rows that hold none are zero (``num_compressed`` counts
      them). ``state`` has the shapes and dtypes of the operand.

    Raises:
      ValueError, TypeError: at trace time, for a wrong shape or attribute, or a wrong dtype; the
        text names the argument.
      NotImplementedError: when differentiated.

    Precision: sums in f32. A row is stored rounded once to the state's dtype, the score after its
    bias is added in f32; a new row counts as stored. Rounding is to nearest even. (On a CPU, XLA's
    threads flush a denormal sum of score and bias to zero.)

    Robustness: nothing outside the operands' buffers is read or written, whatever their values. A
    page id outside [0, num_pages) and a logical page past the table are nowhere: rows written there
    are dropped, rows read there are left out. A window with nothing left, or with no score above
    -inf, gives zero. Rows at negative positions (``kv_lens`` below the number of new rows) are
    ignored. +inf and NaN stay within their channel.

    Pages may be shared by requests, as long as within one step no request writes a row that another
    one writes or reduces; if they do, either value may be seen.

    vmap: the mapped axis folds into the batch of one launch. The state is written, so an unmapped
    state is copied once per index, as vmap's meaning demands. Other unmapped operands are not,
    unless an outer vmap maps them.

    The method is that of DeepSeek-V4's compressor, in the paged form that TensorRT-LLM serves
    (``pagedKvCompressKernel``).
    """
    return with_geometry(
        kv_score,
        ape,
        state,
        block_tables,
        kv_lens,
        compress_ratio=compress_ratio,
        q_lens=q_lens,
        out_dtype=out_dtype,
        implementation=implementation,
    )


def with_geometry(
    kv_score: ArrayLike,
    ape: ArrayLike | None,
    state: CompressorState,
    block_tables: ArrayLike | tuple[ArrayLike, ArrayLike],
    kv_lens: ArrayLike,
    *,
    compress_ratio: int,
    q_lens: ArrayLike | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
    geometry: int = _ffi.AUTO_GEOMETRY,
) -> tuple[Array, CompressorState]:
    """``paged_kv_compress``; benchmarks and tests also name one of the CUDA geometries."""
    if not isinstance(state, CompressorState):
        raise TypeError(f"state: expected a CompressorState, got {type(state).__name__}")
    _config.check_format("state.format", state.format)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {IMPLEMENTATIONS}, got {implementation!r}"
        )
    overlap = _config.overlaps(compress_ratio)
    _config.check_float("out_dtype", out_dtype)

    floats, i32 = ("bfloat16", "float32"), ("int32",)
    kv = _array("state.kv", state.kv, floats, "num_pages", "page_size", "S")
    _config.check_state_dtype("state.kv", state.format, kv.dtype)
    score = _array("state.score", state.score, (kv.dtype.name,), *kv.shape)
    _, page_size, state_dim = kv.shape
    if page_size < 1:
        raise ValueError("state: expected a page_size of at least 1, got 0")
    if state_dim < 1 or (overlap and state_dim % 2):
        raise ValueError(
            f"state: expected S = 2 D of overlapping windows, or S = D, got {state_dim}"
        )
    kv_score = _array("kv_score", kv_score, floats, "B", "next_n", 2 * state_dim)
    batch, next_n, _ = kv_score.shape
    if next_n < 1:
        raise ValueError("kv_score: expected a next_n of at least 1, got 0")
    if ape is not None:
        ape = _array("ape", ape, ("float32",), compress_ratio, state_dim)
    if isinstance(block_tables, tuple):
        if len(block_tables) != 2:
            raise ValueError(f"block_tables: expected a pair, got {len(block_tables)} arrays")
        kv_tables = _array("block_tables[0]", block_tables[0], i32, batch, "max_pages")
        score_tables = _array("block_tables[1]", block_tables[1], i32, *kv_tables.shape)
    else:
        kv_tables = score_tables = _array("block_tables", block_tables, i32, batch, "max_pages")
    kv_lens = _array("kv_lens", kv_lens, i32, batch)
    if q_lens is not None:
        q_lens = _array("q_lens", q_lens, i32, batch)

    out_dtype = jnp.dtype(out_dtype)
    if implementation != "xla":
        head_dim = state_dim // 2 if overlap else state_dim
        names = _config.DTypes(kv_score.dtype.name, kv.dtype.name, out_dtype.name)
        _config.check_compiled(head_dim, compress_ratio, names)
        _ffi.check_available(implementation)
    static = _ffi.Decode(compress_ratio, overlap, state.format, out_dtype, implementation, geometry)
    # The custom call takes an empty array for none.
    ape = jnp.zeros((0, state_dim), jnp.float32) if ape is None else ape
    q_lens = jnp.zeros((0,), jnp.int32) if q_lens is None else q_lens
    new_kv, new_score, kv_comp = _ffi.decode(static)(
        kv, score, kv_score, ape, kv_tables, score_tables, kv_lens, q_lens
    )
    return kv_comp, CompressorState(new_kv, new_score, state.format)
