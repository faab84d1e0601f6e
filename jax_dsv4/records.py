"""Record caches: what attention reads instead of a window's tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_dsv4 import _check, _cpu, _op, _pytree
from jax_dsv4._formats import ROPE_DIM, ROPE_LAYOUTS, RecordFormat
from jax_dsv4._op import Operand
from jax_dsv4.reference import records as reference

RECORD_FORMATS = ("f32", "bf16", "fp8", "fp8_ds_mla", "fp8_block128", "mxfp4")
_COMPILED = tuple(_cpu.RECORDS)  # (format, head_dim)
_SCALES = ("f32", "power_of_two", "ue8m0")
_ROUNDINGS = (None, "once", "none", "model")
_MOST_PAGE_BYTES = 2**31 - 4  # a multiple of 4 that i32 holds
_F32_MAX, _F32_TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


@_pytree.register(("pool",), lambda records: (records._leaf_name,))
@dataclasses.dataclass(frozen=True)
class RecordCache:
    """The paged records of one compressor; a pytree whose only array is the pool.

    Attributes:
      pool: ``[num_pages, stride]`` u8, or ``[layers, num_pages, stride]``. A page holds the data of
        all its records first, then the scales of all of them, then padding. ``stride``, the bytes
        of a page, may be larger than needed.
      format: a member of ``RECORD_FORMATS``.
      head_dim: D, channels of a record.
      page_size: records of a page.
      scales: of ``"fp8_block128"``: ``"f32"``: amax/448; ``"power_of_two"``: the power of two above
        it, as f32; ``"ue8m0"``: the same as four equal exponent bytes.
      scale_floor: of ``"fp8_ds_mla"``: whether the scale is floored at 2^-13, as FlashMLA's
        quantiser does, instead of amax at 1e-4.
    """

    pool: Any
    format: str
    head_dim: int
    page_size: int
    scales: str = "f32"
    scale_floor: bool = False

    def __post_init__(self) -> None:
        """Make NumPy's numbers Python's: equal ones must not be different programs."""
        for name in ("head_dim", "page_size", "scale_floor"):
            value = getattr(self, name)
            if isinstance(value, (np.integer, np.bool_)):
                object.__setattr__(self, name, value.item())

    @property
    def _leaf_name(self) -> str:
        # As in a state's: no checkpoint is restored into a cache of another kind.
        scales = f"_{self.scales}" if self.format == "fp8_block128" else ""
        return f"pool_{self.format}{scales}_d{self.head_dim}_page{self.page_size}"

    @property
    def _kind(self) -> RecordFormat:
        return RecordFormat(self.format, self.head_dim, self.scales, self.scale_floor)


def init_records(
    num_pages: int,
    page_size: int,
    *,
    head_dim: int,
    format: str,
    scales: str = "f32",
    scale_floor: bool = False,
    page_bytes: int | None = None,
    layers: int | None = None,
) -> RecordCache:
    """An empty record cache, all of whose bytes are 0.

    Args:
      num_pages: pages in the pool, of each layer.
      page_size: records per page, at least 1.
      head_dim: D, a multiple of 32, at least 64; 512 for ``"fp8_ds_mla"``, a multiple of 128 for
        ``"fp8_block128"``.
      format: a member of ``RECORD_FORMATS``.
      scales, scale_floor: as in ``RecordCache``.
      page_bytes: the stride of a page, a multiple of 4; at least what its records take, and by
        default the next multiple of 4, for ``"fp8_ds_mla"`` of 576.
      layers: make one cache of so many layers, for calls that name a ``layer``.

    Returns:
      A ``RecordCache``.

    Raises:
      ValueError, TypeError: an argument is none of the above; the text names it.
    """
    page_size = _check.integer("page_size", page_size, 1)
    kind = _checked_kind(format, head_dim, scales, scale_floor)
    needed = kind.page_bytes(page_size)
    if needed > _MOST_PAGE_BYTES:
        raise ValueError(
            f"page_size: expected records of at most {_MOST_PAGE_BYTES} bytes, got {page_size} of "
            f"{needed} bytes"
        )
    if page_bytes is None:
        multiple = 576 if format == "fp8_ds_mla" else 4
        page_bytes = -(-needed // multiple) * multiple
    stride = _check.integer("page_bytes", page_bytes, needed, _MOST_PAGE_BYTES)
    if stride % 4:
        raise ValueError(f"page_bytes: expected a multiple of 4, got {stride}")
    shape = (_check.integer("num_pages", num_pages, 0), stride)
    if layers is not None:
        shape = (_check.integer("layers", layers, 0), *shape)
    _check.array_size("layers, num_pages, page_bytes", shape, jnp.uint8)
    pool = jnp.zeros(shape, jnp.uint8)
    return RecordCache(pool, format, kind.head_dim, page_size, scales, kind.scale_floor)


def _checked_kind(format: Any, head_dim: Any, scales: Any, scale_floor: Any) -> RecordFormat:
    _check.choice("format", format, RECORD_FORMATS)
    head_dim = _check.integer("head_dim", head_dim, ROPE_DIM)
    multiple = 128 if format == "fp8_block128" else 32
    if (format == "fp8_ds_mla" and head_dim != 512) or head_dim % multiple:
        wanted = "512" if format == "fp8_ds_mla" else f"a multiple of {multiple}"
        raise ValueError(f"head_dim: expected {wanted} in format {format!r}, got {head_dim}")
    _check.choice("scales", scales, _SCALES)
    if scales != "f32" and format != "fp8_block128":
        raise ValueError(f"scales: expected 'f32' in format {format!r}, got {scales!r}")
    if not isinstance(scale_floor, (bool, np.bool_)):
        raise TypeError(f"scale_floor: expected True or False, got {scale_floor!r}")
    if scale_floor and format != "fp8_ds_mla":
        raise ValueError(f"scale_floor: expected False in format {format!r}, got True")
    return RecordFormat(format, head_dim, scales, bool(scale_floor))


def check_records(records: Any, layers: bool) -> tuple[Array, RecordFormat]:
    """The pool and the kind of a cache that is what its fields say."""
    if not isinstance(records, RecordCache):
        raise TypeError(f"records: expected a RecordCache, got {type(records).__name__}")
    kind = _checked_kind(records.format, records.head_dim, records.scales, records.scale_floor)
    page_size = _check.integer("records.page_size", records.page_size, 1)
    if hasattr(records.pool, "shape") and len(records.pool.shape) == 3 - layers:
        raise ValueError(
            f"layer: expected a cache {'of' if layers else 'without'} layers, got records.pool of "
            f"shape {list(records.pool.shape)}"
        )
    dims = ("layers",) * layers + ("num_pages", "stride")
    pool = _check.array("records.pool", records.pool, ("uint8",), *dims)
    needed, stride = kind.page_bytes(page_size), pool.shape[-1]
    if stride % 4 or not needed <= stride <= _MOST_PAGE_BYTES:
        raise ValueError(
            f"records.pool: expected pages of a multiple of 4 bytes, at least {needed} for "
            f"{page_size} records, at most {_MOST_PAGE_BYTES}, got {stride}"
        )
    return pool, kind


def check_compiled_records(kind: RecordFormat, implementation: Any) -> None:
    """Raise ``ValueError`` unless the handlers are compiled for records of this kind, if asked."""
    if implementation != "xla" and (kind.name, kind.head_dim) not in _COMPILED:
        raise ValueError(
            f"no compiled format {kind.name!r} for head_dim {kind.head_dim}; compiled are "
            f"{', '.join(f'{name} {dim}' for name, dim in _COMPILED)}; "
            'implementation="xla" serves any head_dim'
        )


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """The static side of a call of ``store_records``."""

    format: RecordFormat
    page_size: int
    rms_norm_eps: float
    rope_layout: str
    hadamard: bool
    rounding: str
    layer: int = -1  # of the pool, where it is known when traced; -1: none, or the operand's


def store_attributes(options: StoreOptions, *operands: Any) -> dict[str, Any]:
    """The attributes of a call, each of its exact type."""
    kind = options.format
    return {
        "format": np.uint8(RECORD_FORMATS.index(kind.name)),
        "page_size": options.page_size,
        "scales": np.uint8(_SCALES.index(kind.scales)),
        "scale_floor": kind.scale_floor,
        "rms_norm_eps": np.float32(options.rms_norm_eps),
        "interleaved": options.rope_layout == "interleaved",
        "hadamard": options.hadamard,
        "rounding": np.uint8(("none", "once", "model").index(options.rounding)),
        "layer": options.layer,
    }


# Operands that a call does not have are empty: norm_weight, cos_sin_cache and layer.
STORE = _op.Operation(
    name="store_records",
    target="jax_dsv4_store_records",
    operands=(
        Operand("values", 2),
        Operand("slots", 1),
        Operand("positions", 1),
        Operand("norm_weight", 1),
        Operand("cos_sin_cache", 2),
        Operand("records.pool", 2, written=True, of_layers=True),
        Operand("layer", 1),
    ),
    groups="records.pool",
    results=lambda options, *operands: (),
    attributes=store_attributes,
    reference=_op.of_layers(reference.store_records),
)
_STORE_IN_LAYERS = STORE.with_layers()


@dataclasses.dataclass(frozen=True)
class _ReadOptions:
    """The static side of a call of ``dequantize_records``."""

    format: RecordFormat
    page_size: int
    layer: int = -1  # as in StoreOptions


DEQUANTIZE = _op.Operation(
    name="dequantize_records",
    target="jax_dsv4_dequantize_records",
    operands=(
        Operand("slots", 1),
        Operand("records.pool", 2, of_layers=True),
        Operand("layer", 1),
    ),
    groups="slots",
    results=lambda options, slots, *_: [((*slots.shape, options.format.head_dim), jnp.float32)],
    attributes=lambda options, *operands: {
        "format": np.uint8(RECORD_FORMATS.index(options.format.name)),
        "page_size": options.page_size,
        "scales": np.uint8(_SCALES.index(options.format.scales)),
        "layer": options.layer,
    },
    reference=_op.of_layers(reference.dequantize_records),
)
_DEQUANTIZE_IN_LAYERS = DEQUANTIZE.with_layers()


def store_records(
    values: ArrayLike,
    slots: ArrayLike,
    positions: ArrayLike,
    records: RecordCache,
    *,
    norm_weight: ArrayLike | None = None,
    cos_sin_cache: ArrayLike | None = None,
    rms_norm_eps: float = 1e-6,
    rope_layout: str = "halves",
    hadamard: bool = False,
    rounding: str | None = None,
    layer: int | ArrayLike | None = None,
    implementation: str | None = None,
) -> RecordCache:
    """Make records of compressed values, and store them in their slots.

    In f32, in this order: RMSNorm; rotary embedding of the last 64 channels; Hadamard transform;
    then the cache's format.

    Args:
      values: ``[N, D]`` f32 or bf16, compressed values.
      slots: ``[N]`` i32, ``page * page_size + row`` of each record; one that does not exist,
        negative or past the pool, gets nothing. No two values may go to one slot.
      positions: ``[N]`` i32, rows of ``cos_sin_cache``; a value whose row does not exist is not
        stored. Unused without a table.
      records: the cache. Donate it (``jax.jit(..., donate_argnums=...)``) and it is updated in
        place, without a copy.
      norm_weight: ``[D]`` f32, or ``None``: no norm.
      cos_sin_cache: ``[max_position, 64]`` f32, the engine's table, or ``None``: no rotation.
      rms_norm_eps: added to the mean square, inside the root. Less than the least normal f32,
        1.2e-38, counts as that: a record of zeros has a root, too.
      rope_layout: of a table's row: ``"halves"``: 32 cosines, then 32 sines (vLLM, TensorRT-LLM);
        ``"interleaved"``: cosine, sine, cosine, ... (SGLang).
      hadamard: whether to transform, as the indexer's records need; D a power of two.
      rounding: what is rounded to bf16: ``"once"``, the default without ``hadamard``: what a
        quantised format is given (vLLM, SGLang's main records); ``"none"``, the default with it
        (SGLang's indexer, TensorRT-LLM); ``"model"``: the value, and the result of each step
        (DeepSeek's own code). Different choices give different bytes.
      layer: which layer of the cache is written: an integer, or a scalar i32 on the device. One
        that does not exist gets nothing.
      implementation: ``None``: the compiled kernel on CPU and CUDA, the jnp reference elsewhere;
        ``"ffi"``: the compiled kernel; ``"xla"``: the jnp reference, for any D.

    Returns:
      The cache. Bytes that belong to no stored record are what they were.

    Raises:
      ValueError, TypeError: at trace time, for a wrong shape, dtype or choice; the text names the
        argument.
      NotImplementedError: when differentiated.

    Precision: quantisers are exact: amax and quotients in f32, correctly rounded, power-of-two
    scales from the bits of amax/448 (amax/6 in ``"mxfp4"``), to nearest even, saturating. Of the
    steps before, sums may be in any order. NaN is stored as the format's NaN (7 in e2m1); it and
    infinities change no other block.

    vmap: one launch. The pool is written, so an unmapped one is copied once per index, as vmap's
    meaning demands.

    The formats are those of FlashMLA, DeepGEMM, vLLM, SGLang and TensorRT-LLM.
    """
    pool, kind = check_records(records, layer is not None)
    _check.choice("implementation", implementation, _check.IMPLEMENTATIONS)
    check_compiled_records(kind, implementation)
    values = _check.array("values", values, _check.FLOATS, "N", kind.head_dim)
    count = values.shape[0]
    slots = _check.array("slots", slots, _check.I32, count)
    positions = _check.array("positions", positions, _check.I32, count)
    weight, table = check_norm_and_rotation(norm_weight, cos_sin_cache, kind.head_dim)
    index, layer_operand = _check.layer(layer, pool.shape[0])
    made_by = check_record_options(rms_norm_eps, rope_layout, hadamard, rounding)
    if hadamard:
        check_hadamard(kind)
    options = StoreOptions(kind, records.page_size, **made_by, layer=index)
    operation = STORE if layer is None else _STORE_IN_LAYERS
    (pool,) = _op.call(
        operation,
        options,
        implementation,
        *(values, slots, positions, weight, table, pool, layer_operand),
    )
    return dataclasses.replace(records, pool=pool)


def check_record_options(
    rms_norm_eps: Any, rope_layout: Any, hadamard: Any, rounding: Any
) -> dict[str, Any]:
    """What a record is made by, each choice in one form, by its name."""
    eps = rms_norm_eps
    is_number = isinstance(eps, (int, float, np.floating, np.integer)) and not isinstance(eps, bool)
    if not is_number or not 0 <= eps <= _F32_MAX:
        raise ValueError(
            f"rms_norm_eps: expected a static number of f32, of at least 0, got {eps!r}"
        )
    _check.choice("rope_layout", rope_layout, ROPE_LAYOUTS)
    if not isinstance(hadamard, (bool, np.bool_)):
        raise TypeError(f"hadamard: expected True or False, static, got {hadamard!r}")
    _check.choice("rounding", rounding, _ROUNDINGS)
    return {
        "rms_norm_eps": max(float(eps), _F32_TINY),
        "rope_layout": rope_layout,
        "hadamard": bool(hadamard),
        "rounding": rounding or ("none" if hadamard else "once"),
    }


def check_norm_and_rotation(
    norm_weight: Any, cos_sin_cache: Any, head_dim: int
) -> tuple[Array, Array]:
    """The weight and the table; empty ones for what is ``None``."""
    weight = _check.optional("norm_weight", norm_weight, ("float32",), head_dim)
    if cos_sin_cache is None:
        return weight, _check.absent(jnp.float32, ROPE_DIM)
    table = _check.array("cos_sin_cache", cos_sin_cache, ("float32",), "positions", ROPE_DIM)
    if table.shape[0] < 1:
        raise ValueError("cos_sin_cache: expected at least one position, got 0")
    return weight, table


def check_hadamard(kind: RecordFormat) -> None:
    """Raise ``ValueError`` where a record of this kind cannot be transformed."""
    if kind.name == "fp8_ds_mla" or kind.head_dim & (kind.head_dim - 1):
        raise ValueError(
            f"hadamard: expected False in format {kind.name!r} with head_dim {kind.head_dim}: it "
            "mixes all channels of a power of two"
        )


def dequantize_records(
    records: RecordCache,
    slots: ArrayLike,
    *,
    layer: int | ArrayLike | None = None,
    implementation: str | None = None,
) -> Array:
    """The records in some slots, in f32.

    Args:
      records: the cache.
      slots: ``[N]`` i32; one that does not exist gives zeros.
      layer: which layer of the cache is read, as in ``store_records``.
      implementation: as in ``store_records``.

    Returns:
      ``[N, D]`` f32: code times scale, with at most one rounding.

    Raises:
      ValueError, TypeError: a wrong shape, dtype or choice; the text names the argument.
      NotImplementedError: when differentiated.

    vmap: one launch; an unmapped pool is not copied.
    """
    pool, kind = check_records(records, layer is not None)
    _check.choice("implementation", implementation, _check.IMPLEMENTATIONS)
    check_compiled_records(kind, implementation)
    slots = _check.array("slots", slots, _check.I32, "N")
    index, layer_operand = _check.layer(layer, pool.shape[0])
    operation = DEQUANTIZE if layer is None else _DEQUANTIZE_IN_LAYERS
    options = _ReadOptions(kind, records.page_size, index)
    (values,) = _op.call(operation, options, implementation, slots, pool, layer_operand)
    return values
