"""The only list of shapes and regimes, and the operands of each.

What is compiled comes from ``jax_dsv4._config``; a case adds sizes, and a regime: what is special
about the operands. Cases that differ in regime only share their shapes, hence a compilation.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jax_dsv4._config import DTYPES, KINDS, DTypes, Geometry, Kind

INT32_MIN, INT32_MAX = np.iinfo(np.int32).min, np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Case:
    head_dim: int
    ratio: int
    next_n: int
    dtypes: DTypes
    regime: str = "boundaries"
    batch: int = 14
    page_size: int = 8
    max_len: int = 0  # the tables hold at least so many rows
    name: str = ""
    state_format: str = "raw"
    overlap: bool | None = None

    def __post_init__(self) -> None:
        if self.overlap is None:  # the ratio's
            object.__setattr__(self, "overlap", self.ratio == 4)

    @property
    def kind(self) -> Kind:
        return Kind(self.head_dim, self.ratio, bool(self.overlap))

    @property
    def state_dim(self) -> int:
        return self.kind.state_dim

    @property
    def num_windows(self) -> int:
        return -(-self.next_n // self.ratio)

    @property
    def lengths(self) -> list[int]:
        """Sequence lengths whose last or first new token lies at a window boundary."""
        edges = [edge * self.ratio + by for edge in (1, 2) for by in (0, 1, -1)] + [0]
        return list(dict.fromkeys([*edges, *(edge + self.next_n for edge in edges)]))

    @property
    def max_pages(self) -> int:
        return -(-max(self.max_len, *self.lengths) // self.page_size)

    @property
    def num_pages(self) -> int:
        return self.batch * self.max_pages + 3

    def __str__(self) -> str:
        dtypes = ".".join({"bfloat16": "bf16", "float32": "f32"}[dtype] for dtype in self.dtypes)
        sizes = f"batch{self.batch}-page{self.page_size}"
        name = self.name or (
            f"hd{self.head_dim}-R{self.ratio}{'' if self.overlap == (self.ratio == 4) else 'other'}"
            f"-n{self.next_n}-{dtypes}-{sizes}-{self.regime}"
        )
        return name if self.state_format == "raw" else f"{name}-{self.state_format}"

    def in_prefix(self) -> Case:
        """The same on a state of prefixes, which is f32."""
        dtypes = self.dtypes._replace(state="float32")
        return dataclasses.replace(self, dtypes=dtypes, state_format="prefix")


@dataclasses.dataclass
class Operands:
    """In the order of ``oracle.paged_kv_compress``; one table for both: the same array twice."""

    kv_score: np.ndarray
    ape: np.ndarray | None
    kv: np.ndarray
    score: np.ndarray
    kv_tables: np.ndarray
    score_tables: np.ndarray
    kv_lens: np.ndarray
    q_lens: np.ndarray | None

    def astuple(self) -> tuple[np.ndarray | None, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


OPERAND_NAMES = tuple(field.name for field in dataclasses.fields(Operands))


def make_operands(case: Case, seed: int = 0) -> Operands:
    """The operands of a case; every row of the pool holds something, whoever it belongs to."""
    rng = np.random.default_rng([seed, zlib.crc32(str(case).encode())])
    kv_score_dtype, state_dtype, _ = (jnp.dtype(name) for name in case.dtypes)

    def normal(scale: float, *shape: int) -> np.ndarray:
        return scale * rng.standard_normal(shape, np.float32)

    def shuffled_tables() -> np.ndarray:
        pages = rng.permutation(case.num_pages)[: case.batch * case.max_pages]
        return pages.astype(np.int32).reshape(case.batch, case.max_pages)

    pool = (case.num_pages, case.page_size, case.state_dim)
    new = (case.batch, case.next_n, case.state_dim)
    operands = Operands(
        kv_score=np.concatenate([normal(1, *new), normal(2, *new)], -1).astype(kv_score_dtype),
        ape=normal(1, case.ratio, case.state_dim),
        kv=normal(1, *pool).astype(state_dtype),
        score=normal(2, *pool).astype(state_dtype),
        kv_tables=shuffled_tables(),
        score_tables=shuffled_tables(),
        kv_lens=_cycle(np.roll(case.lengths, -seed * case.batch), case),
        q_lens=None,
    )
    REGIMES[case.regime](case, operands)
    if operands.q_lens is not None:
        operands.q_lens = np.roll(operands.q_lens, seed)
    return operands


# ------------------------------------------------------------------------------------ the regimes


def _cycle(values: Sequence[int] | np.ndarray, case: Case) -> np.ndarray:
    return np.resize(values, case.batch).astype(np.int32)


def _boundaries(case: Case, x: Operands) -> None:
    """What every other regime starts from: phases mixed, tables shuffled, one for each array."""


def _one_table(case: Case, x: Operands) -> None:
    x.score_tables = x.kv_tables


def _no_ape(case: Case, x: Operands) -> None:
    """Scores are then stored as they are: also -0 and denormals."""
    x.ape = None
    new_scores = x.kv_score[..., case.state_dim :]
    new_scores[..., 1::7] = -0.0
    new_scores[..., 2::7] = 1e-39


def _inactive(case: Case, x: Operands) -> None:
    x.kv_lens[::3] = np.resize([0, -1, INT32_MIN, -case.ratio], len(x.kv_lens[::3]))
    x.q_lens = _cycle([0, case.next_n, -1, INT32_MIN, 1], case)


def _ragged(case: Case, x: Operands) -> None:
    n = case.next_n
    x.q_lens = _cycle([n, 1, n - 1, n + 3, 2, INT32_MAX, 0, -2, INT32_MIN], case)


def _short(case: Case, x: Operands) -> None:
    R, n = case.ratio, case.next_n
    assert n > R + 1
    x.kv_lens = _cycle([R, n - 1, R + 1, 1, R - 1, 2], case)


def _bad_pages(case: Case, x: Operands) -> None:
    """Each request's last pages: of kv, of score, or of both; all pages of some requests."""
    ids = [-1, case.num_pages, INT32_MIN, INT32_MAX, case.num_pages + 7, -case.num_pages]
    for b, length in enumerate(x.kv_lens):
        bad = ids[b % len(ids)]
        last = max(int(length) - 1, 0) // case.page_size
        pages = slice(0, None) if b % 7 == 6 else slice(last, last + 1)
        if b % 3 != 1:
            x.kv_tables[b, pages] = bad
        if b % 3 != 0:
            x.score_tables[b, pages] = bad


def _past_table(case: Case, x: Operands) -> None:
    end, R = case.max_pages * case.page_size, case.ratio
    straddling = (end // R + 1) * R
    near = [end // R * R, straddling, straddling + R, end + 1, end + case.next_n, end + R]
    far = [INT32_MAX, INT32_MAX - 1, INT32_MAX - 3, INT32_MAX - R, INT32_MAX - R + 1, 1 << 30]
    x.kv_lens = _cycle([*near, *far], case)


def _minus_inf(case: Case, x: Operands) -> None:
    """All old rows of every third request, all new rows of every second, one row of the others."""
    new_scores = x.kv_score[..., case.state_dim :]
    new_scores[::2] = -np.inf
    new_scores[1::2, 0] = -np.inf
    x.score[x.score_tables[::3]] = -np.inf
    x.score[x.score_tables[1::3], 0] = -np.inf
    if case.state_format == "prefix":  # of no row: the mean is 0
        for b, tables in enumerate(x.score_tables):
            x.kv[x.kv_tables[b]] = np.where(x.score[tables] == -np.inf, 0, x.kv[x.kv_tables[b]])


def _fresh(case: Case, x: Operands) -> None:
    x.kv[...] = 0
    x.score[...] = -np.inf


NON_FINITE_COLUMNS = {"new kv": -1, "new score": -4, "NaN new score": -6, "kv": -9, "score": -14}


def _non_finite(case: Case, x: Operands) -> None:
    """Single columns; negative ones are of the half that the window itself uses."""
    columns = NON_FINITE_COLUMNS
    new_kv, new_score = np.split(x.kv_score, 2, axis=-1)
    new_kv[..., columns["new kv"]] = np.nan
    new_score[..., columns["new score"]] = np.inf
    new_score[..., columns["NaN new score"]] = np.nan
    x.kv[..., columns["kv"]] = np.inf
    x.score[..., columns["score"]] = np.nan


def _large_scores(case: Case, x: Operands) -> None:
    """exp() of the even columns would overflow, of the odd ones all underflow."""
    offset = np.where(np.arange(case.state_dim) % 2, -1e4, 1e4).astype(np.float32)
    for scores in (x.kv_score[..., case.state_dim :], x.score):
        scores[...] = scores.astype(np.float32) + offset


def _ties(case: Case, x: Operands) -> None:
    """f32 values with one bit more than bf16 holds: half of them lie between two bf16 values."""
    x.ape = np.zeros_like(x.ape)
    bits = x.kv_score.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF8000)
    x.kv_score = bits.view(np.float32).astype(x.kv_score.dtype)


def _shared_prefix(case: Case, x: Operands) -> None:
    """All requests share their first pages, which none of them writes."""
    num_shared = max(1, case.ratio // case.page_size)
    for tables in (x.kv_tables, x.score_tables):
        tables[:, :num_shared] = tables[0, :num_shared]
    x.kv_lens = np.maximum(x.kv_lens, num_shared * case.page_size + case.next_n).astype(np.int32)


def _long_table(case: Case, x: Operands) -> None:
    """Around the 512th entry: a kernel may copy tables of up to so many, and no longer ones."""
    at, R = 512 * case.page_size, case.ratio
    near = [at + by for by in (0, 1, 2, case.next_n, case.next_n + 1, R, R + 1, -1)]
    x.kv_lens = _cycle([*near, case.max_pages * case.page_size, R], case)


REGIMES: dict[str, Callable[[Case, Operands], None]] = {
    "boundaries": _boundaries,
    "one_table": _one_table,
    "no_ape": _no_ape,
    "inactive": _inactive,
    "ragged": _ragged,
    "short": _short,
    "bad_pages": _bad_pages,
    "past_table": _past_table,
    "minus_inf": _minus_inf,
    "fresh": _fresh,
    "non_finite": _non_finite,
    "large_scores": _large_scores,
    "ties": _ties,
    "shared_prefix": _shared_prefix,
    "long_table": _long_table,
}

# --------------------------------------------------------------------------------------- the list

BF16_IN_F32_STATE = DTypes("bfloat16", "float32", "float32")
F32_IN_BF16_STATE = DTypes("float32", "bfloat16", "float32")
# The smallest head_dim of each ratio and overlap: for what does not depend on it.
SMALL_KINDS = tuple(
    min(kind for kind in KINDS if kind[1:] == windows)
    for windows in dict.fromkeys(kind[1:] for kind in KINDS)
)


def case_of(kind: Kind, next_n: int, dtypes: DTypes, regime: str = "boundaries", **sizes) -> Case:
    return Case(
        kind.head_dim, kind.compress_ratio, next_n, dtypes, regime, overlap=kind.overlap, **sizes
    )


MTP = (
    Case(128, 4, 4, BF16_IN_F32_STATE, name="overlap hd128 next_n 4"),
    Case(512, 4, 3, BF16_IN_F32_STATE, name="overlap hd512 next_n 3"),
    Case(128, 128, 4, BF16_IN_F32_STATE, batch=2, name="hd128 R 128, batch 2, next_n 4"),
    Case(512, 128, 4, BF16_IN_F32_STATE, name="hd512 R 128, next_n 4"),
)
CONFIGURATIONS = tuple(case_of(kind, 2, dtypes) for kind in KINDS for dtypes in DTYPES)
NEXT_N = tuple(
    case_of(kind, next_n, BF16_IN_F32_STATE)
    for kind in SMALL_KINDS
    for next_n in (1, 2, 3, 4, 5, 6, 7, 8, 11, 129)
    if kind.compress_ratio > 2 or next_n in (1, 2, 3, 4, 129)
)
PAGE_SIZES = tuple(
    case_of(kind, 3, F32_IN_BF16_STATE, page_size=page_size)
    for kind in SMALL_KINDS
    for page_size in (1, 4, 8, 32, 100, 128, 256)
    if kind.compress_ratio > 2 or page_size in (1, 8)
)
IN_REGIMES = tuple(
    case_of(
        kind,
        kind.compress_ratio + 5 if regime == "short" else 4,
        F32_IN_BF16_STATE if kind.head_dim == 128 else BF16_IN_F32_STATE,
        regime,
    )
    for kind in KINDS
    for regime in REGIMES
    if regime != "long_table"
)
LONG_TABLES = tuple(
    case_of(
        kind,
        4,
        BF16_IN_F32_STATE,
        "long_table",
        page_size=1,
        max_len=max_len,
        name=f"hd{kind.head_dim} R {kind.compress_ratio}, a table of {max_len}",
    )
    for kind in SMALL_KINDS
    for max_len in (512, 700)
)
RANDOM = tuple(  # sizes for operands that are drawn
    case_of(kind, 3, BF16_IN_F32_STATE, batch=3, page_size=page_size)
    for kind, page_size in zip(SMALL_KINDS, itertools.cycle((3, 50)), strict=False)
)
REWIND = tuple(  # sizes for runs of many steps
    case_of(kind, 4, BF16_IN_F32_STATE, batch=4, page_size=12, max_len=100) for kind in SMALL_KINDS
)
MAPPED = Case(128, 4, 3, F32_IN_BF16_STATE, "ragged", 3)
MAPPED_BARE = Case(128, 4, 3, F32_IN_BF16_STATE, "no_ape", 3)
DONATED = Case(128, 4, 2, BF16_IN_F32_STATE, batch=4, page_size=32, max_len=512)


def _on_pages_of(geometry: Geometry, case: Case) -> Case:
    """The case, with a page size that the geometry can serve: a lane's rows are on one page."""
    reduced_rows = case.ratio * (1 + case.overlap)
    rows_per_lane = reduced_rows * geometry.lanes // (32 * geometry.warps)
    if case.page_size % rows_per_lane == 0:
        return case
    return dataclasses.replace(case, page_size=rows_per_lane)


HARD_REGIMES = ("bad_pages", "past_table", "ragged", "short")
_HARD = [*CONFIGURATIONS, *(c for c in IN_REGIMES if c.regime in HARD_REGIMES)]
GEOMETRIES = tuple(  # what a call can be told to use, in every configuration and where it is hard
    (_on_pages_of(geometry, case), index)
    for case in _HARD
    for index, geometry in enumerate(case.kind.geometries)
)
# On prefixes the batch decides: enough requests for the kernel for many, whatever the head_dim.
MANY = tuple(
    case_of(kind, next_n, BF16_IN_F32_STATE, regime, batch=(1 << 16) // kind.head_dim + by)
    for kind in KINDS
    for next_n, regime, by in ((4, "boundaries", 3), (6, "ragged", 2), (6, "bad_pages", 2))
    if kind.head_dim == 512 or regime == "boundaries"
)
PREFIX_GEOMETRIES = tuple(
    (case.in_prefix(), -1) for case in dict.fromkeys([*_HARD, *MANY, *LONG_TABLES])
)
ALL = tuple(dict.fromkeys([*MTP, *CONFIGURATIONS, *NEXT_N, *PAGE_SIZES, *IN_REGIMES, *LONG_TABLES]))


def in_formats(cases: Sequence[Case]) -> tuple[Case, ...]:
    """The cases on raw states and on states of prefixes."""
    return tuple(dict.fromkeys([*cases, *(case.in_prefix() for case in cases)]))
