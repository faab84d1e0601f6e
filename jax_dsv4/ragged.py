"""Ragged batches, public side: prompts, chunks of them and decode steps in one call."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_dsv4 import _check, _op
from jax_dsv4._op import Operand
from jax_dsv4.decode import DECODE, DecodeOptions, check_call, check_tables, window_attributes
from jax_dsv4.reference import ragged as reference
from jax_dsv4.state import CompressorState

RAGGED_ROWS = ("T",)  # the dimension of a ragged batch's new rows


@dataclasses.dataclass(frozen=True)
class LiveRows:
    """Of a call's new rows, those that later steps may read: made by ``live``."""

    max_rewind: int
    resume_every: int | None = None

    def __post_init__(self) -> None:
        """Check both, and put each in one form."""
        object.__setattr__(self, "max_rewind", _check.integer("max_rewind", self.max_rewind, 0))
        if self.resume_every is not None:
            every = _check.integer("resume_every", self.resume_every, 1)
            object.__setattr__(self, "resume_every", every)


def live(*, max_rewind: int, resume_every: int | None = None) -> LiveRows:
    """Of a ragged batch's new rows, store those only that a later step may read.

    A row that no such step reads is never written, so its page may be anybody's, or nowhere. At
    8,192 tokens and ``max_rewind=3``, that leaves 8 rows of a prompt where R is 4, 127 where it is
    128; in format ``"prefix"`` 5 and 3.

    Args:
      max_rewind: how many tokens a later step may take back: none starts at a length below
        ``kv_lens - max_rewind`` of this call or of any before it, 0 or more. With drafts: their
        number.
      resume_every: that steps may also start at any multiple of it in this call's rows, as those of
        a request do whose prefix is cached, 1 or more; ``None``: none does. To share pages rather
        than to copy them, it must be a multiple of the page size.

    Returns:
      A ``LiveRows``, for ``store_rows=``: static, equal where its fields are.

    Raises:
      ValueError, TypeError: an argument is none of the above; the text names it.
    """
    return LiveRows(max_rewind, resume_every)


@dataclasses.dataclass(frozen=True)
class RaggedOptions(DecodeOptions):
    """The static side of a call."""

    max_rewind: int = -1  # -1: all rows are stored
    resume_every: int = 0  # 0: none


def _results(options: RaggedOptions, kv_score, new_score, ape, kv, score, kv_tables, *rest):
    num_windows = kv_score.shape[0] // options.compress_ratio + kv_tables.shape[0]
    return [((num_windows, options.head_dim(kv.shape[-1])), jnp.dtype(options.out_dtype))]


def _attributes(options: RaggedOptions, kv_score, new_score, ape, kv, *rest):
    return window_attributes(options, kv_score, kv) | {
        "max_rewind": options.max_rewind,
        "resume_every": options.resume_every,
    }


# As in DECODE, what a call does not have is empty: also num_seqs.
RAGGED = _op.Operation(
    name="ragged_kv_compress",
    target="jax_dsv4_ragged_kv_compress",
    operands=(
        Operand("kv_score", 2),
        Operand("kv_score[1]", 2, like="kv_score"),
        *(DECODE[name] for name in DECODE.names[2 : DECODE.names.index("q_lens")]),
        Operand("cu_q_lens", 1),
        Operand("num_seqs", 1),
        DECODE["layer"],
    ),
    groups="state.kv",
    results=_results,
    attributes=_attributes,
    reference=_op.of_layers(reference.ragged_kv_compress),
)
_WITH_LAYERS = RAGGED.with_layers()


def check_store_rows(store_rows: Any) -> dict[str, int]:
    """Its options: ``"all"``, or those of a ``LiveRows``."""
    if isinstance(store_rows, LiveRows):
        return {"max_rewind": store_rows.max_rewind, "resume_every": store_rows.resume_every or 0}
    if isinstance(store_rows, str) and store_rows == "all":
        return {}
    raise ValueError(f"store_rows: expected 'all' or live(max_rewind=...), got {store_rows!r}")


def ragged_kv_compress(
    kv_score: ArrayLike | tuple[ArrayLike, ArrayLike],
    ape: ArrayLike | None,
    state: CompressorState,
    block_tables: ArrayLike | tuple[ArrayLike, ArrayLike],
    kv_lens: ArrayLike,
    cu_q_lens: ArrayLike,
    *,
    compress_ratio: int,
    overlap: bool | None = None,
    layer: int | ArrayLike | None = None,
    num_seqs: ArrayLike | None = None,
    store_rows: str | LiveRows = "all",
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: str | _op.Kernel | None = None,
) -> tuple[Array, CompressorState]:
    """DeepSeek-V4's KV compressor on requests that bring any number of new tokens each.

    Prompts, chunks of prompts that go on at any position, prompts behind a cached prefix, and
    decode steps, in one call and in any mix. What a request gets is what ``paged_kv_compress`` on
    the same rows gives it. With T rows in all, and B, R, D and S as there:

    Args:
      kv_score: ``[T, 2 S]`` bf16 or f32, the new tokens' projections, kv then score, one request
        after the other. T is a static capacity, and may be 0. Or a pair ``(kv, score)`` of
        ``[T, S]`` each, taken as they are, without a copy.
      ape, state, compress_ratio, overlap, layer, out_dtype, implementation: as in
        ``paged_kv_compress``.
      block_tables: ``[B, max_pages]`` i32, or a pair, as there; B may be 0.
      kv_lens: ``[B]`` i32, sequence lengths including the new tokens; 0 or less: inactive.
      cu_q_lens: ``[B + 1]`` i32: request b's new rows are ``kv_score[cu_q_lens[b] :
        cu_q_lens[b + 1]]``. Each entry is clamped to 0...T, and to at least the one before it. Rows
        of no request are padding: they may hold anything, NaN too, and reach nothing.
      num_seqs: i32 scalar on the device, how many of the B requests are there, clamped to 0...B;
        default all. What the others' entries hold is never used.
      store_rows: static. ``"all"`` new rows, or ``live(...)``: those that a later step may read,
        and no others.

    Returns:
      ``(kv_comp, state)``. ``kv_comp`` is ``[T // R + B, D]``: the values of the windows completed,
      window i of those of request b, oldest first, in row ``cu_q_lens[b] // R + b + i``; all other
      rows are zero. ``ragged_windows`` says which row holds what. ``state`` has the shapes and
      dtypes of the operand.

    Raises:
      ValueError, TypeError: at trace time, for a wrong shape or attribute, or a wrong dtype; the
        text names the argument.
      NotImplementedError: when differentiated.

    Precision: as in ``paged_kv_compress``. New rows are taken from ``kv_score``, rounded as stored.
    Rows in format ``"raw"`` have the same bits however a prompt is cut, and prefixes and values are
    equal within its bounds.

    Robustness: as there, whatever the operands' values. Where a request brings more rows than its
    length, the first ones are ignored. New rows whose page is nowhere: with ``live``, they count in
    the windows that this call completes, so that a long prompt needs no page for what is never read
    again; with ``"all"``, they are left out. In format ``"prefix"`` a new row that is left out
    passes the prefix on, and an old one restarts its window.

    No request may write a row that another one writes or reads in the same call. Two positions of
    one request may share a row if at most one of them is stored by the call, and if it does not
    read the other one: a GPU may have stored the first before it reads.

    vmap: as in ``paged_kv_compress``.
    """
    options, operands, layer_operand = check_call(
        functools.partial(RaggedOptions, **check_store_rows(store_rows)),
        *(
            RAGGED_ROWS,
            kv_score,
            ape,
            state,
            compress_ratio,
            overlap,
            layer,
            out_dtype,
            implementation,
        ),
    )
    batch = _check.ragged_batch(kv_lens, cu_q_lens, num_seqs)
    tables = check_tables(block_tables, batch[0].shape[0])
    operation = RAGGED if layer is None else _WITH_LAYERS
    operands = (*operands, *tables, *batch, layer_operand)
    kv_comp, kv, score = _op.call(operation, options, implementation, *operands)
    return kv_comp, CompressorState(kv, score, state.format)
