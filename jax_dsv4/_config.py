"""The compiled configurations, read from the list in ``ffi/config.h`` through the CPU module."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_dsv4 import _cpu


class Geometry(NamedTuple):
    """How a CUDA thread block shares one window's reduction: see ``ffi/config.h``."""

    warps: int
    lanes: int
    rows_per_step: int
    min_ctas: int
    baseline: bool


class Shape(NamedTuple):
    """A kind of compressor."""

    head_dim: int
    compress_ratio: int
    overlap: bool
    geometries: tuple[Geometry, ...]


class DTypes(NamedTuple):
    """A combination of element types, by name."""

    kv_score: str
    state: str
    out: str


SHAPES = tuple(Shape(d, r, o, tuple(Geometry(*g) for g in gs)) for d, r, o, gs in _cpu.SHAPES)
DTYPES = tuple(DTypes(*names) for names in _cpu.DTYPES)
# The dtypes that a state may have in each format; in the order of the attribute's values.
STATE_DTYPES = {name: tuple(dtypes) for name, dtypes in _cpu.STATE_FORMATS}
STATE_FORMATS = tuple(STATE_DTYPES)
_OVERLAP = {shape.compress_ratio: shape.overlap for shape in SHAPES}


def overlaps(compress_ratio: int) -> bool:
    """Whether the windows of this ratio reach back over the window before them."""
    if type(compress_ratio) is not int or compress_ratio not in _OVERLAP:
        raise ValueError(
            f"compress_ratio: expected one of {tuple(sorted(_OVERLAP))}, got {compress_ratio!r}"
        )
    return _OVERLAP[compress_ratio]


def check_float(name: str, dtype: DTypeLike) -> None:
    """Raise ``TypeError`` unless ``dtype`` is one of the floating-point types served."""
    try:
        got = jnp.dtype(dtype).name
    except TypeError:
        got = repr(dtype)
    if got not in ("bfloat16", "float32"):
        raise TypeError(f"{name}: expected bfloat16 or float32, got {got}")


def check_format(name: str, format: str) -> None:
    """Raise ``ValueError`` unless ``format`` is a state's."""
    if format not in STATE_FORMATS:
        raise ValueError(f"{name}: expected one of {STATE_FORMATS}, got {format!r}")


def check_state_dtype(name: str, format: str, dtype: DTypeLike) -> None:
    """Raise ``TypeError`` unless a state of this format may have this dtype."""
    check_float(name, dtype)
    got, allowed = jnp.dtype(dtype).name, STATE_DTYPES[format]
    if got not in allowed:
        raise TypeError(
            f"{name}: expected {' or '.join(allowed)} in state format {format!r}, got {got}: "
            "rounded to less than float32 at each of its rows, a prefix drifts"
        )


def check_compiled(head_dim: int, compress_ratio: int, dtypes: DTypes) -> None:
    """Raise ``ValueError`` unless the handlers are compiled for this configuration."""
    shapes = [(s.head_dim, s.compress_ratio) for s in SHAPES]
    if (head_dim, compress_ratio) not in shapes or dtypes not in DTYPES:
        raise ValueError(
            f"no compiled configuration for head_dim {head_dim}, compress_ratio {compress_ratio}, "
            f"kv_score {dtypes.kv_score}, state {dtypes.state}, kv_comp {dtypes.out}; "
            "head_dim/compress_ratio are compiled for "
            + ", ".join(f"{d}/{r}" for d, r in shapes)
            + "; kv_score/state/kv_comp for "
            + ", ".join("/".join(names) for names in DTYPES)
            + '; implementation="xla" serves any head_dim'
        )
