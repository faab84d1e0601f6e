"""The decode operation, public side: documentation, checks, and the record of what it is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_dsv4 import _check, _config, _op
from jax_dsv4._op import Operand
from jax_dsv4.reference import decode as reference
from jax_dsv4.state import CompressorState, check_state


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """The static side of a call."""

    compress_ratio: int
    overlap: bool
    state_format: str
    out_dtype: str
    layer: int = -1  # of the state, where it is known when traced; -1: none, or the operand's

    def head_dim(self, state_dim: int) -> int:
        """D, of a state of so many channels."""
        return state_dim // 2 if self.overlap else state_dim


def _results(options: DecodeOptions, kv_score, new_score, ape, kv, *rest):
    batch, next_n, _ = kv_score.shape
    num_windows = -(-next_n // options.compress_ratio)
    return [((batch, num_windows, options.head_dim(kv.shape[-1])), jnp.dtype(options.out_dtype))]


def window_attributes(options: DecodeOptions, kv_score: Any, kv: Any) -> dict[str, Any]:
    """The attributes of any call that completes windows, each of its exact type."""
    return {
        "compress_ratio": options.compress_ratio,
        "overlap": options.overlap,
        "layer": options.layer,
        "kv_score_dtype": _config.DATA_TYPE[kv_score.dtype],
        "state_format": np.uint8(_config.STATE_FORMATS.index(options.state_format)),
        "state_dtype": _config.DATA_TYPE[kv.dtype],
        "out_dtype": _config.DATA_TYPE[jnp.dtype(options.out_dtype)],
    }


def _attributes(options: DecodeOptions, kv_score, new_score, ape, kv, *rest):
    return window_attributes(options, kv_score, kv) | {"next_n": int(kv_score.shape[1])}


# Operands that a call does not have are empty: new_score, where kv_score holds the scores, too;
# ape; q_lens; and layer.
DECODE = _op.Operation(
    name="paged_kv_compress",
    target="jax_dsv4_paged_kv_compress",
    operands=(
        Operand("kv_score", 3),
        Operand("kv_score[1]", 3, like="kv_score"),
        Operand("ape", 2),
        Operand("state.kv", 3, written=True, of_layers=True),
        Operand("state.score", 3, written=True, of_layers=True),
        Operand("kv_tables", 2),
        Operand("score_tables", 2),
        Operand("kv_lens", 1),
        Operand("q_lens", 1),
        Operand("layer", 1),
    ),
    groups="state.kv",
    results=_results,
    attributes=_attributes,
    reference=_op.of_layers(reference.paged_kv_compress),
)
_WITH_LAYERS = DECODE.with_layers()


ROWS = ("B", "next_n")  # the dimensions of a decode step's new rows


def check_new_rows(kv_score: Any, state_dim: int, dims: tuple[str, ...]) -> tuple[Array, Array]:
    """``kv_score`` of rows in ``dims``, and an empty array; or kv and score apart."""
    floats, S = _check.FLOATS, state_dim
    if not isinstance(kv_score, tuple):
        rows = _check.array("kv_score", kv_score, floats, *dims, 2 * S)
        apart = _check.absent(rows.dtype, *(0,) * (rows.ndim - 1))
    elif len(kv_score) != 2:
        raise ValueError(f"kv_score: expected a pair (kv, score), got {len(kv_score)} arrays")
    else:
        rows = _check.array("kv_score[0]", kv_score[0], floats, *dims, S)
        apart = _check.array("kv_score[1]", kv_score[1], (rows.dtype.name,), *rows.shape)
    if dims == ROWS and rows.shape[1] < 1:
        raise ValueError("kv_score: expected a next_n of at least 1, got 0")
    return rows, apart


def check_tables(tables: Any, batch: int, name: str = "block_tables") -> tuple[Array, Array]:
    """The tables of kv and of score."""
    if not isinstance(tables, tuple):
        table = _check.array(name, tables, _check.I32, batch, "max_pages")
        return table, table
    if len(tables) != 2:
        raise ValueError(f"{name}: expected a pair, got {len(tables)} arrays")
    kv_tables = _check.array(f"{name}[0]", tables[0], _check.I32, batch, "max_pages")
    score_tables = _check.array(f"{name}[1]", tables[1], _check.I32, *kv_tables.shape)
    return kv_tables, score_tables


def check_implementation(implementation: Any) -> None:
    """Raise ``ValueError`` unless it is a choice, or a kernel that benchmarks and tests name."""
    if not isinstance(implementation, _op.Kernel):
        _check.choice("implementation", implementation, _check.IMPLEMENTATIONS)


def check_call(
    options_of: Callable[..., DecodeOptions],
    dims: tuple[str, ...],
    kv_score: Any,
    ape: Any,
    state: Any,
    compress_ratio: Any,
    overlap: Any,
    layer: Any,
    out_dtype: Any,
    implementation: Any,
) -> tuple[DecodeOptions, tuple[Array, ...], Array]:
    """The options of a call that ends in values; kv_score, ape and state as operands; its layer."""
    ratio, overlap = _check.ratio_and_overlap(compress_ratio, overlap)
    check_implementation(implementation)
    out_dtype = _check.floating("out_dtype", out_dtype)
    kv, score = check_state(state, overlap=overlap, layers=layer is not None)
    state_dim = kv.shape[-1]
    index, layer_operand = _check.layer(layer, kv.shape[0])
    options = options_of(ratio, overlap, state.format, out_dtype, layer=index)
    new_rows = check_new_rows(kv_score, state_dim, dims)
    if implementation != "xla":
        kind = _config.Kind(options.head_dim(state_dim), ratio, overlap)
        dtypes = _config.DTypes(new_rows[0].dtype.name, kv.dtype.name, out_dtype)
        _config.check_compiled(kind, dtypes)
    ape = _check.optional("ape", ape, ("float32",), ratio, state_dim)
    return options, (*new_rows, ape, kv, score), layer_operand


def paged_kv_compress(
    kv_score: ArrayLike | tuple[ArrayLike, ArrayLike],
    ape: ArrayLike | None,
    state: CompressorState,
    block_tables: ArrayLike | tuple[ArrayLike, ArrayLike],
    kv_lens: ArrayLike,
    *,
    compress_ratio: int,
    overlap: bool | None = None,
    layer: int | ArrayLike | None = None,
    q_lens: ArrayLike | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: str | _op.Kernel | None = None,
) -> tuple[Array, CompressorState]:
    """One decode step of DeepSeek-V4's KV compressor on a paged state.

    Stores the new tokens' rows and, for each window of ``compress_ratio`` tokens that they
    complete, computes its compressed value: per channel, a softmax over the window's stored scores
    times its stored kv. With B requests, R = ``compress_ratio``, D channels per compressed value
    and S = 2 D where windows overlap, D where they do not:

    Args:
      kv_score: ``[B, next_n, 2 S]`` bf16 or f32, the new tokens' projections, kv then score.
        ``next_n`` is the static number of rows a step brings per request, at least 1. Or a pair
        ``(kv, score)`` of ``[B, next_n, S]`` each, taken as they are, without a copy.
      ape: ``[R, S]`` f32, bias added to the scores by position inside the window, or ``None``.
      state: ``CompressorState`` of two ``[num_pages, page_size, S]`` arrays, bf16 or f32; in format
        ``"prefix"`` f32. Donate it (``jax.jit(..., donate_argnums=...)``) and it is updated in
        place, without a copy. With ``layer``, of two ``[layers, num_pages, page_size, S]``.
      block_tables: ``[B, max_pages]`` i32, the page of each logical page of each request; or a pair
        ``(kv_tables, score_tables)``, one for each array of the state.
      kv_lens: ``[B]`` i32, sequence lengths including the new tokens; 0 or less: inactive slot.
      compress_ratio: R, static.
      overlap: whether windows overlap, static; ``None``: those of ratio 4 do, others do not.
      layer: which layer of the state the call works on, in place, with page ids local to it: an
        integer, or a scalar i32 on the device (the index of a ``scan``). One that does not exist
        reaches nothing, and gives zeros.
      q_lens: ``[B]`` i32, how many rows of ``kv_score`` are real, left-aligned; clamped to
        0...next_n; default all. 0: inactive slot.
      out_dtype: of ``kv_comp``, bf16 or f32.
      implementation: ``None``: the compiled kernel on CPU and CUDA, the jnp reference elsewhere;
        ``"ffi"``: the compiled kernel; ``"xla"``: the jnp reference, for any D.

    Returns:
      ``(kv_comp, state)``. ``kv_comp`` is ``[B, ceil(next_n / R), D]``: the values of the windows
      completed in this step, oldest first; rows that hold none are zero (``num_compressed`` counts
      them, ``completed_windows`` says which they are). ``state`` has the shapes and dtypes of the
      operand.

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
    threads flush a denormal sum of score and bias to zero.) A raw value is finite as long as
    ``R max|kv|`` (``2 R max|kv|`` where windows overlap) is. In format ``"prefix"``, the logsumexp
    and the mean are rounded to f32 once per row; by the compiled kernel on a CPU in the same way
    however the rows are split into steps, elsewhere their last bits can depend on that. To first
    order in u = 2^-24, a value is then off by at most ``R u (12 + max|lse|) max|kv|``, over the
    window's rows (one more than R where windows overlap). The largest errors in 262,144 channels
    after 128 rows, relative to max|kv|, on a CPU: 1.0e-6 for scores of N(0, 2), 1.6e-5 for
    100 + N(0, 2), 2e-3 around 1e4, where f32 leaves a logsumexp three decimals.

    Robustness: nothing outside the operands' buffers is read or written, whatever their values. A
    page id outside [0, num_pages) and a logical page past the table are nowhere: rows written there
    are dropped, rows read there are left out. A window with nothing left, or with no score above
    -inf, gives zero. Rows at negative positions (``kv_lens`` below the number of new rows) are
    ignored. +inf and NaN stay within their channel. A row whose score is -inf weighs nothing, but
    its kv must be finite: 0 times infinity or NaN is NaN.

    Pages may be shared by requests, as long as within one step no request writes a row that another
    one writes or reads; if they do, either value may be seen.

    vmap: the mapped axis folds into the batch of one launch. The state is written, so an unmapped
    state is copied once per index, as vmap's meaning demands. Other unmapped operands are not,
    unless an outer vmap maps them.

    The method is that of DeepSeek-V4's compressor, in the paged form that TensorRT-LLM serves
    (``pagedKvCompressKernel``).
    """
    options, operands, layer_operand = check_call(
        *(DecodeOptions, ROWS, kv_score, ape, state, compress_ratio, overlap),
        *(layer, out_dtype, implementation),
    )
    batch = operands[0].shape[0]
    tables = check_tables(block_tables, batch)
    kv_lens = _check.array("kv_lens", kv_lens, _check.I32, batch)
    q_lens = _check.optional("q_lens", q_lens, _check.I32, batch)
    operation = DECODE if layer is None else _WITH_LAYERS
    operands = (*operands, *tables, kv_lens, q_lens, layer_operand)
    kv_comp, kv, score = _op.call(operation, options, implementation, *operands)
    return kv_comp, CompressorState(kv, score, state.format)


def raw_to_prefix(
    state: CompressorState,
    block_tables: ArrayLike | tuple[ArrayLike, ArrayLike],
    kv_lens: ArrayLike,
    *,
    compress_ratio: int,
    overlap: bool | None = None,
    implementation: str | None = None,
) -> CompressorState:
    """A raw state in format ``"prefix"``, on the device: for decoding to go on in that format.

    Converted are the rows that a raw state still needs: those of each request's open window and,
    where windows overlap, of the one before it. All other rows keep what they hold, which is no
    prefix: convert everything that is to be continued in one call, a cached prefix of a sequence as
    one more request.

    Args:
      state: in format ``"raw"``, bf16 or f32; shapes as in ``paged_kv_compress``. Of a state of
        layers, every layer is converted, by the same tables.
      block_tables: ``[B, max_pages]`` i32, or a pair, as there.
      kv_lens: ``[B]`` i32, the rows written that count. A later step may begin there, or anywhere
        else in the open window, ``kv_lens // R * R`` and up; 0 or less: inactive slot.
      compress_ratio, overlap, implementation: as in ``paged_kv_compress``, which does the work.

    Returns:
      The state, f32. Rows that requests share, they convert alike; a row either of whose pages is
      nowhere is left out of the prefixes after it.

    Raises:
      ValueError, TypeError: for a wrong shape or dtype, or a state that is not raw: a prefix does
        not hold its rows any more, so there is no way back.

    It needs room for the converted rows, ``[B, R, 2 S]`` f32 (2 R where windows overlap). An f32
    state is converted in place where it is donated; a bf16 one gets new arrays.
    """
    ratio, overlap = _check.ratio_and_overlap(compress_ratio, overlap)
    has_layers = isinstance(state, CompressorState) and getattr(state.kv, "ndim", 3) == 4
    kv, score = check_state(state, overlap=overlap, layers=has_layers)
    if state.format != "raw":
        raise ValueError(
            f"state.format: expected 'raw', got {state.format!r}; rows are not to be had back "
            "from a state that holds their prefixes"
        )
    kv_lens = _check.array("kv_lens", kv_lens, _check.I32, "B")
    tables = check_tables(block_tables, kv_lens.shape[0])
    _check.choice("implementation", implementation, _check.IMPLEMENTATIONS)
    operands = _op.vary_alike((kv, score, *tables, kv_lens))
    return _convert(*operands, ratio, overlap, implementation)


@dataclasses.dataclass(frozen=True)
class _RowsOptions:
    """The static side of reading rows."""

    ratio: int
    overlap: bool


def _rows_read(
    options: _RowsOptions, kv: Any, _score: Any, tables: Any, *_: Any
) -> list[tuple[tuple[int, ...], str]]:
    num_rows = (1 + options.overlap) * options.ratio - 1
    return [((tables.shape[0], num_rows, kv.shape[-1]), "float32")] * 2


# Reads the rows that a raw state of f32 still needs. It has no kernel, and is an operation for the
# sake of meshes: JAX refuses to index an array by another one if only one of them is split.
_READ = _op.Operation(
    name="raw_to_prefix",
    target="",
    operands=tuple(
        dataclasses.replace(DECODE[name], written=False)
        for name in ("state.kv", "state.score", "kv_tables", "score_tables", "kv_lens", "layer")
    ),
    groups="kv_lens",
    results=_rows_read,
    attributes=lambda *_: {},
    reference=reference.read_rows,
)
_READ_LAYER = _READ.with_layers()


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _convert(
    kv: Array,
    score: Array,
    kv_tables: Array,
    score_tables: Array,
    kv_lens: Array,
    ratio: int,
    overlap: bool,
    implementation: str | None,
) -> CompressorState:
    read = _READ if kv.ndim == 3 else _READ_LAYER
    first = reference.first_needed(kv_lens, ratio, overlap)

    def convert(layer: Array | None, prefixes: CompressorState) -> CompressorState:
        # From the start of a window, and of scores that have their bias: rows as a step's new ones.
        at = _check.absent(jnp.int32) if layer is None else layer[None]
        # A layer is still raw when its turn comes, and f32 holds bf16 exactly.
        operands = (prefixes.kv, prefixes.score, kv_tables, score_tables, kv_lens, at)
        new_kv, new_score = _op.call(read, _RowsOptions(ratio, overlap), "xla", *operands)
        _, prefixes = paged_kv_compress(
            (new_kv, new_score),
            None,
            prefixes,
            (kv_tables, score_tables),
            kv_lens,
            compress_ratio=ratio,
            overlap=overlap,
            layer=layer,
            q_lens=kv_lens - first,
            out_dtype=jnp.float32,
            implementation=implementation,
        )
        return prefixes

    prefixes = CompressorState(kv.astype(jnp.float32), score.astype(jnp.float32), "prefix")
    if kv.ndim == 3:
        return convert(None, prefixes)
    return jax.lax.fori_loop(
        0,
        kv.shape[0],
        # int64 in x64 mode, Python's where JAX compiles nothing.
        lambda layer, prefixes: convert(jnp.asarray(layer, jnp.int32), prefixes),
        prefixes,
    )
