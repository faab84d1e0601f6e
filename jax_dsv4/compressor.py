"""Whole compressors: decode steps and ragged batches that end in records."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array
from jax.typing import ArrayLike

from jax_dsv4 import _check, _config, _op, _pytree
from jax_dsv4._op import Operand
from jax_dsv4.decode import (
    DECODE,
    ROWS,
    DecodeOptions,
    check_implementation,
    check_new_rows,
    check_tables,
)
from jax_dsv4.ragged import RAGGED, RAGGED_ROWS, LiveRows, RaggedOptions, check_store_rows
from jax_dsv4.records import (
    STORE,
    RecordCache,
    StoreOptions,
    check_compiled_records,
    check_hadamard,
    check_norm_and_rotation,
    check_record_options,
    check_records,
    store_attributes,
)
from jax_dsv4.reference import compressor as reference
from jax_dsv4.state import CompressorState, check_state


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

    What ``None`` stands for is settled here, once: who derives one compressor from another by
    ``dataclasses.replace`` gives ``overlap`` and ``rounding`` anew.

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


@dataclasses.dataclass(frozen=True)
class _Part:
    """The static side of one compressor's part of a call."""

    values: DecodeOptions
    store: StoreOptions
    column: int  # of kv_score, which may hold those of other compressors: the first of its own


@dataclasses.dataclass(frozen=True)
class _Options:
    """The static side of a call."""

    compressors: tuple[_Part, ...]
    layer: int = -1  # where it is known when traced; -1: none, or the operand's


# Attributes of the operation that ends in values which are the whole call's, not a compressor's.
_OF_CALL = ("next_n", "max_rewind", "resume_every")


def _operands_of(values: _op.Operation) -> tuple[tuple[Operand, ...], tuple[Operand, ...]]:
    """Those of one compressor, and those of all, where the values of ``values`` become records.

    Those that a compressor does not have are empty, as in ``values`` and STORE.
    """
    shared = values.names.index("kv_lens")
    to_records = (STORE[name] for name in ("norm_weight", "cos_sin_cache", "records.pool"))
    own = (*values.operands[:shared], Operand("tables.records", 2), *to_records)
    return own, values.operands[shared:]


def _attributes(values: _op.Operation, options: _Options, *operands: Any) -> dict[str, Any]:
    size = len(_operands_of(values)[0])
    attributes: dict[str, Any] = {"layer": options.layer}
    for i, part in enumerate(options.compressors):
        own = dict(values.attributes(part.values, *operands[i * size :]))
        attributes |= {name: own.pop(name) for name in _OF_CALL if name in own}
        own |= store_attributes(part.store) | {"column": part.column}
        for name in ("layer", "out_dtype"):
            del own[name]
        attributes[f"compressor_{i}"] = own
    return attributes


@functools.cache
def _ending_in_records(
    values: _op.Operation,
    name: str,
    reference: Callable[..., tuple[Array, ...]],
    count: int,
    has_layers: bool,
) -> _op.Operation:
    """The operation on so many compressors that stores the values of ``values`` as records."""
    own, shared = _operands_of(values)
    operands = []
    for i in range(count):
        owner = _owner(i, count)
        operands += [
            dataclasses.replace(o, name=owner + o.name, like=o.like and owner + o.like) for o in own
        ]
    operation = _op.Operation(
        name=name,
        target=f"jax_dsv4_{name}",
        operands=(*operands, *shared),
        groups=_owner(0, count) + "state.kv",
        results=lambda options, *operands: (),
        attributes=functools.partial(_attributes, values),
        reference=_op.of_layers(reference),
    )
    return operation.with_layers() if has_layers else operation


decode_records_of = functools.partial(
    _ending_in_records, DECODE, "decode_records", reference.decode_records
)
ragged_records_of = functools.partial(
    _ending_in_records, RAGGED, "ragged_records", reference.ragged_records
)


def _owner(index: int, count: int) -> str:
    """In front of the names of what is one of several compressors'."""
    return f"compressor[{index}]: " if count > 1 else ""


def decode_records(
    kv_score: Any,
    compressor: Compressor | tuple[Compressor, ...],
    cache: CompressorCache | tuple[CompressorCache, ...],
    tables: CacheTables | tuple[CacheTables, ...],
    kv_lens: ArrayLike,
    *,
    layer: int | ArrayLike | None = None,
    q_lens: ArrayLike | None = None,
    implementation: str | _op.Kernel | None = None,
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

    It is one custom call. On a GPU that is one launch for one compressor, and for two of which one
    is a layer's main compressor, head_dim 512 with overlapping windows, and one its indexer's,
    head_dim 128, of the same dtypes and state format; for other tuples it is a launch for each. The
    order of some sums differs from the two operations above: next to no byte of a record differs.
    """
    given = _part_of_each(kv_score, compressor, cache, tables, ROWS)
    parts, operands = _check_parts(given, DecodeOptions, ROWS, None, layer, implementation)
    kv_lens = _check.array("kv_lens", kv_lens, _check.I32, operands[0][0].shape[0])
    q_lens = _check.optional("q_lens", q_lens, _check.I32, *kv_lens.shape)
    caches = _call(
        decode_records_of, given, parts, operands, (kv_lens, q_lens), layer, implementation
    )
    return caches if isinstance(compressor, tuple) else caches[0]


def ragged_records(
    kv_score: Any,
    compressor: Compressor | tuple[Compressor, ...],
    cache: CompressorCache | tuple[CompressorCache, ...],
    tables: CacheTables | tuple[CacheTables, ...],
    kv_lens: ArrayLike,
    cu_q_lens: ArrayLike,
    *,
    layer: int | ArrayLike | None = None,
    num_seqs: ArrayLike | None = None,
    store_rows: str | LiveRows = "all",
    implementation: str | _op.Kernel | None = None,
) -> Any:
    """A ragged batch through whole compressors: from projections to stored records.

    ``ragged_kv_compress``, whose values stay in f32, and ``store_records`` of the windows that the
    call completes. A call that completes none writes no byte of the record cache.

    Args:
      kv_score: ``[T, 2 S]`` bf16 or f32, or a pair of ``[T, S]``, as in ``ragged_kv_compress``. For
        several compressors: one array of all their columns, in their order, or a tuple of the
        above.
      compressor, cache, tables: as in ``decode_records``.
      kv_lens, cu_q_lens, num_seqs, store_rows, implementation: as in ``ragged_kv_compress``.
      layer: which layer of state and records the call works on.

    Returns:
      The cache; a tuple of as many. A window of which nothing is left, all of its rows being
      nowhere, gives a record of zeros; what is not stored: as in ``decode_records``.

    Raises:
      ValueError, TypeError: at trace time, for a wrong shape, dtype or choice; the text names the
        argument.
      NotImplementedError: when differentiated.

    vmap: as in ``paged_kv_compress``: the cache is written, so an unmapped one is copied per index.
    """
    options_of = functools.partial(RaggedOptions, **check_store_rows(store_rows))
    batch = _check.ragged_batch(kv_lens, cu_q_lens, num_seqs)
    given = _part_of_each(kv_score, compressor, cache, tables, RAGGED_ROWS)
    parts, operands = _check_parts(
        given, options_of, RAGGED_ROWS, batch[0].shape[0], layer, implementation
    )
    caches = _call(ragged_records_of, given, parts, operands, batch, layer, implementation)
    return caches if isinstance(compressor, tuple) else caches[0]


def _check_parts(
    given: list[_Given],
    options_of: Callable[..., DecodeOptions],
    dims: tuple[str, ...],
    batch: int | None,
    layer: Any,
    implementation: str | _op.Kernel | None,
) -> tuple[list[_Part], list[tuple[Array, ...]]]:
    """The static sides and the operands of all compressors, checked."""
    check_implementation(implementation)
    has_layers = layer is not None
    parts, operands = [], []
    for i, own in enumerate(given):
        try:
            part, of_part = _check_part(own, options_of, dims, batch, has_layers, implementation)
            if operands:
                _check_alike(of_part, operands[0], has_layers)
        except (TypeError, ValueError) as error:
            error.args = (f"{_owner(i, len(given))}{error}",)
            raise
        parts.append(part)
        operands.append(of_part)
    return parts, operands


def _call(
    operation_of: Callable[[int, bool], _op.Operation],
    given: list[_Given],
    parts: list[_Part],
    operands: list[tuple[Array, ...]],
    shared: tuple[Array, ...],
    layer: Any,
    implementation: str | _op.Kernel | None,
) -> tuple[CompressorCache, ...]:
    """The call, and the caches that it leaves."""
    index, layer_operand = _check.layer(layer, operands[0][3].shape[0])
    results = _op.call(
        operation_of(len(parts), layer is not None),
        _Options(tuple(parts), index),
        implementation,
        *(x for of_part in operands for x in of_part),
        *(*shared, layer_operand),
    )
    caches = []
    for i, own in enumerate(given):
        kv, score, pool = results[3 * i : 3 * i + 3]
        state = CompressorState(kv, score, own.cache.state.format)
        caches.append(CompressorCache(state, dataclasses.replace(own.cache.records, pool=pool)))
    return tuple(caches)


class _Given(NamedTuple):
    """What a user passes for one compressor."""

    kv_score: Any
    column: int | None  # of an array of all compressors' columns, checked: its own first one
    compressor: Any
    cache: Any
    tables: Any


def _part_of_each(
    kv_score: Any, compressor: Any, cache: Any, tables: Any, dims: tuple[str, ...]
) -> list[_Given]:
    if not isinstance(compressor, tuple):
        return [_Given(kv_score, None, compressor, cache, tables)]
    count = len(compressor)
    if not count:
        raise ValueError("compressor: expected a Compressor, or a tuple of some, got none")
    for name, x in (("cache", cache), ("tables", tables)):
        if not isinstance(x, tuple) or len(x) != count:
            got = len(x) if isinstance(x, tuple) else type(x).__name__
            raise ValueError(f"{name}: expected a tuple of {count}, as compressor is, got {got}")
    for c in compressor:
        _check_type("compressor", c, Compressor)
    if not isinstance(kv_score, tuple):
        widths = [c.state_dim for c in compressor]
        rows = (check_new_rows(kv_score, sum(widths), dims),) * count
        columns = [2 * sum(widths[:i]) for i in range(count)]
    elif len(kv_score) == count:
        rows, columns = kv_score, [None] * count
    else:
        raise ValueError(
            f"kv_score: expected {count} arrays, one for each compressor, got {len(kv_score)}"
        )
    return list(map(_Given, rows, columns, compressor, cache, tables))


def _check_part(
    given: _Given,
    options_of: Callable[..., DecodeOptions],
    dims: tuple[str, ...],
    batch: int | None,  # None: of kv_score's first dimension
    has_layers: bool,
    implementation: str | _op.Kernel | None,
) -> tuple[_Part, tuple[Array, ...]]:
    """The static side and the operands of one compressor."""
    kv_score, column, c, cache, tables = given
    _check_type("compressor", c, Compressor)
    _check_type("cache", cache, CompressorCache)
    _check_type("tables", tables, CacheTables)
    state, records = cache.state, cache.records
    pool, kind = check_records(records, has_layers)
    if kind.head_dim != c.head_dim:
        raise ValueError(
            f"cache.records: expected head_dim {c.head_dim}, the compressor's, got {kind.head_dim}"
        )
    kv, score = check_state(state, overlap=c.overlap, layers=has_layers)
    if kv.shape[-1] != c.state_dim:
        raise ValueError(
            f"cache.state: expected S = {c.state_dim}, the compressor's, got {kv.shape[-1]}"
        )
    if has_layers and pool.shape[0] != kv.shape[0]:
        raise ValueError(
            f"cache.records: expected {kv.shape[0]} layers, as cache.state, got {pool.shape[0]}"
        )
    num_pages = pool.shape[-2]
    if isinstance(num_pages, int) and num_pages * records.page_size >= 2**31:
        raise ValueError("cache.records: expected fewer than 2^31 records in a layer")
    rows, apart = check_new_rows(kv_score, c.state_dim, dims) if column is None else kv_score
    if implementation != "xla":
        dtypes = _config.DTypes(rows.dtype.name, kv.dtype.name, "float32")
        _config.check_compiled(_config.Kind(c.head_dim, c.compress_ratio, c.overlap), dtypes)
    check_compiled_records(kind, implementation)
    if c.hadamard:
        check_hadamard(kind)
    size = rows.shape[0] if batch is None else batch
    part = _Part(
        options_of(c.compress_ratio, c.overlap, state.format, "float32"),
        StoreOptions(
            kind, records.page_size, c.rms_norm_eps, c.rope_layout, c.hadamard, c.rounding
        ),
        column or 0,
    )
    return part, (
        rows,
        apart,
        _check.optional("ape", c.ape, ("float32",), c.compress_ratio, c.state_dim),
        kv,
        score,
        *check_tables(tables.state, size, "tables.state"),
        _check.array("tables.records", tables.records, _check.I32, size, "max_pages"),
        *check_norm_and_rotation(c.norm_weight, c.cos_sin_cache, c.head_dim),
        pool,
    )


def _check_alike(operands: tuple[Array, ...], first: tuple[Array, ...], has_layers: bool) -> None:
    """What a compressor must have in common with the first one."""
    (rows, _, _, kv, *_), (first_rows, _, _, first_kv, *_) = operands, first
    *dims, _ = first_rows.shape
    if rows.shape[:-1] != tuple(dims):
        raise ValueError(
            f"kv_score: expected shape [{', '.join(map(str, dims))}, columns], as compressor[0]'s, "
            f"got {list(rows.shape)}"
        )
    if has_layers and kv.shape[0] != first_kv.shape[0]:
        raise ValueError(
            f"cache: expected {first_kv.shape[0]} layers, as compressor[0]'s, got {kv.shape[0]}"
        )


def _check_type(name: str, x: Any, expected: type) -> None:
    if not isinstance(x, expected):
        raise TypeError(f"{name}: expected a {expected.__name__}, got {type(x).__name__}")
