"""The compiled configurations, read from the list in ``ffi/config.h`` through the CPU module."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_dsv4 import _cpu


class Geometry(NamedTuple):
    """How a CUDA thread block shares one window's reduction: see ``ffi/tuning.h``."""

    warps: int
    lanes: int
    rows_in_flight: int
    min_ctas: int


class Kind(NamedTuple):
    """A kind of compressor; windows that overlap reach back over the window before them."""

    head_dim: int
    compress_ratio: int
    overlap: bool

    @property
    def state_dim(self) -> int:
        """S, the channels of a state's row."""
        return self.head_dim * (1 + self.overlap)

    @property
    def geometries(self) -> tuple[Geometry, ...]:
        """Those compiled for it, in the order of the custom call's attribute."""
        return GEOMETRIES[self]

    def __str__(self) -> str:
        windows = "overlapping" if self.overlap else "disjoint"
        return f"{self.head_dim}/{self.compress_ratio} {windows}"


class DTypes(NamedTuple):
    """A combination of element types, by name."""

    kv_score: str
    state: str
    out: str

    def __str__(self) -> str:
        return "/".join(self)


GEOMETRIES = {Kind(d, r, o): tuple(Geometry(*g) for g in gs) for d, r, o, gs in _cpu.KINDS}
KINDS = tuple(GEOMETRIES)
RATIOS = tuple(sorted({kind.compress_ratio for kind in KINDS}))
DTYPES = tuple(DTypes(*names) for names in _cpu.DTYPES)
# The dtypes that a state may have in each format; in the order of the attribute's values.
STATE_DTYPES = {name: tuple(dtypes) for name, dtypes in _cpu.STATE_FORMATS}
STATE_FORMATS = tuple(STATE_DTYPES)
# xla::ffi::DataType, the 8-bit enumeration that the dtype attributes are typed as.
DATA_TYPE = {jnp.dtype(jnp.float32): np.uint8(11), jnp.dtype(jnp.bfloat16): np.uint8(16)}


def check_compiled(kind: Kind, dtypes: DTypes) -> None:
    """Raise ``ValueError`` unless the handlers are compiled for this configuration."""
    if kind in KINDS and dtypes in DTYPES:
        return
    others = [str(k) for k in KINDS if k.state_dim == kind.state_dim and kind not in KINDS]
    hint = f"; a state of S = {kind.state_dim} is {' or '.join(others)}" if others else ""
    raise ValueError(
        f"no compiled configuration for head_dim {kind.head_dim}, "
        f"compress_ratio {kind.compress_ratio}, overlap {kind.overlap}, "
        f"kv_score {dtypes.kv_score}, state {dtypes.state}, kv_comp {dtypes.out}{hint}; "
        f"head_dim/compress_ratio are compiled for {', '.join(map(str, KINDS))}; "
        f"kv_score/state/kv_comp for {', '.join(map(str, DTYPES))}; "
        'implementation="xla" serves any head_dim'
    )
