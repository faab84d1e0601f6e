"""The decode operation, public side: documentation, checks, operands."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_dsv4 import _config, _ffi, reference
from jax_dsv4.state import CompressorState

IMPLEMENTATIONS = (None, "ffi", "xla")
_FLOATS, _I32 = ("bfloat16", "float32"), ("int32",)


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


def _check_state(state: Any) -> None:
    if not isinstance(state, CompressorState):
        raise TypeError(f"state: expected a CompressorState, got {type(state).__name__}")
    _config.check_format("state.format", state.format)


def _pools(state: CompressorState, overlap: bool) -> tuple[Array, Array]:
    """The state's kv and score, of the dtypes and shapes that its format and windows allow."""
    kv = _array("state.kv", state.kv, _FLOATS, "num_pages", "page_size", "S")
    _config.check_state_dtype("state.kv", state.format, kv.dtype)
    score = _array("state.score", state.score, (kv.dtype.name,), *kv.shape)
    _, page_size, state_dim = kv.shape
    if page_size < 1:
        raise ValueError("state: expected a page_size of at least 1, got 0")
    if state_dim < 1 or (overlap and state_dim % 2):
        raise ValueError(
            f"state: expected S = 2 D of overlapping windows, or S = D, got {state_dim}"
        )
    return kv, score


def _tables(block_tables: Any, batch: int) -> tuple[Array, Array]:
    """Those of kv and of score."""
    if not isinstance(block_tables, tuple):
        table = _array("block_tables", block_tables, _I32, batch, "max_pages")
        return table, table
    if len(block_tables) != 2:
        raise ValueError(f"block_tables: expected a pair, got {len(block_tables)} arrays")
    kv_tables = _array("block_tables[0]", block_tables[0], _I32, batch, "max_pages")
    return kv_tables, _array("block_tables[1]", block_tables[1], _I32, *kv_tables.shape)


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
      state: ``CompressorState`` of two ``[num_pages, page_size, S]`` arrays, bf16 or f32; in format
        ``"prefix"`` f32. Donate it (``jax.jit(..., donate_argnums=...)``) and it is updated in
        place, without a copy.
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

    State formats: a ``"raw"`` row is the token's own, and a completed window reads all its rows. A
    ``"prefix"`` row holds, per channel, the logsumexp of its window's scores up to the row (in
    ``score``) and the mean of kv that their softmax weighs (in ``kv``): a step reads one row per
    request, and where windows overlap the last row of the window before. The same values come out,
    up to rounding, whatever is rewound, dropped or left out; except that a row before the step that
    is nowhere takes with it what its window held so far.

    Precision: sums in f32. A row is stored rounded once to the state's dtype, the score after its
    bias is added in f32; a new row counts as stored. Rounding is to nearest even. (On a CPU, XLA's
    threads flush a denormal sum of score and bias to zero.) In format ``"prefix"``, the logsumexp
    and the mean are rounded to f32 once per row; by the compiled kernel on a CPU in the same way
    however the rows are split into steps, elsewhere their last bits can depend on that. To first
    order in u = 2^-24, a value is then off by at most ``R u (12 + max|lse|) max|kv|``, over the
    window's rows (one more than R where windows overlap). The largest errors in 262,144 channels
    after 128 rows, relative to max|kv|, on a CPU: 1.0e-6 for scores of N(0, 2), 1.3e-5 for
    100 + N(0, 2), 2e-3 around 1e4, where f32 leaves a logsumexp three decimals.

    Robustness: nothing outside the operands' buffers is read or written, whatever their values. A
    page id outside [0, num_pages) and a logical page past the table are nowhere: rows written there
    are dropped, rows read there are left out. A window with nothing left, or with no score above
    -inf, gives zero. Rows at negative positions (``kv_lens`` below the number of new rows) are
    ignored. +inf and NaN stay within their channel.

    Pages may be shared by requests, as long as within one step no request writes a row that another
    one writes or reads; if they do, either value may be seen.

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
    _check_state(state)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {IMPLEMENTATIONS}, got {implementation!r}"
        )
    overlap = _config.overlaps(compress_ratio)
    _config.check_float("out_dtype", out_dtype)

    kv, score = _pools(state, overlap)
    state_dim = kv.shape[-1]
    kv_score = _array("kv_score", kv_score, _FLOATS, "B", "next_n", 2 * state_dim)
    batch, next_n, _ = kv_score.shape
    if next_n < 1:
        raise ValueError("kv_score: expected a next_n of at least 1, got 0")
    if ape is not None:
        ape = _array("ape", ape, ("float32",), compress_ratio, state_dim)
    kv_tables, score_tables = _tables(block_tables, batch)
    kv_lens = _array("kv_lens", kv_lens, _I32, batch)
    if q_lens is not None:
        q_lens = _array("q_lens", q_lens, _I32, batch)

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


def raw_to_prefix(
    state: CompressorState,
    block_tables: ArrayLike | tuple[ArrayLike, ArrayLike],
    kv_lens: ArrayLike,
    *,
    compress_ratio: int,
    implementation: str | None = None,
) -> CompressorState:
    """A raw state in format ``"prefix"``, on the device: for decoding to go on in that format.

    Converted are the rows that a raw state still needs: those of each request's open window and,
    where windows overlap, of the one before it. All other rows keep what they hold, which is no
    prefix: convert everything that is to be continued in one call, a cached prefix of a sequence as
    one more request.

    Args:
      state: in format ``"raw"``, bf16 or f32; shapes as in ``paged_kv_compress``.
      block_tables: ``[B, max_pages]`` i32, or a pair, as there.
      kv_lens: ``[B]`` i32, the rows written that count. A later step may begin there, or anywhere
        else in the open window, ``kv_lens // R * R`` and up; 0 or less: inactive slot.
      compress_ratio: R.
      implementation: as in ``paged_kv_compress``, which does the work.

    Returns:
      The state, f32. Rows that requests share, they convert alike; a row either of whose pages is
      nowhere is left out of the prefixes after it.

    Raises:
      ValueError, TypeError: for a wrong shape or dtype, or a state that is not raw: a prefix does
        not hold its rows any more, so there is no way back.

    It needs room for the converted rows twice, ``[B, R, 2 S]`` f32 (2 R where windows overlap).
    """
    _check_state(state)
    if state.format != "raw":
        raise ValueError(
            f"state.format: expected 'raw', got {state.format!r}; rows are not to be had back "
            "from a state that holds their prefixes"
        )
    overlap = _config.overlaps(compress_ratio)
    kv, score = _pools(state, overlap)
    kv_lens = _array("kv_lens", kv_lens, _I32, "B")
    tables = _tables(block_tables, kv_lens.shape[0])
    first = jnp.maximum(kv_lens // compress_ratio - overlap, 0) * compress_ratio
    positions = first[:, None] + jnp.arange((1 + overlap) * compress_ratio - 1)
    # From the start of a window, and of scores that have their bias: the rows as a step's new ones.
    rows = [reference.read_rows(*x, positions) for x in zip((kv, score), tables, strict=True)]
    _, prefixes = paged_kv_compress(
        jnp.concatenate(rows, axis=-1).astype(jnp.float32),
        None,
        CompressorState(kv.astype(jnp.float32), score.astype(jnp.float32), "prefix"),
        tables,
        kv_lens,
        compress_ratio=compress_ratio,
        q_lens=kv_lens - first,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    return prefixes
