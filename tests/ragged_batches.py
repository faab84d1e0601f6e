"""Random ragged batches in regimes, each checked against float64.

``python tests/ragged_batches.py 20000`` checks so many, by the compiled kernel and the reference.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from cases import INT32_MAX, INT32_MIN, DTypes
from checks import Results, bits, check_results, check_same_bits

from jax_dsv4 import CompressorState, LiveRows, live, ragged_kv_compress
from jax_dsv4._config import KINDS, Kind


class Sizes(NamedTuple):
    """The static sizes of a batch."""

    kind: Kind
    num_rows: int
    batch: int
    page_size: int
    max_pages: int

    @property
    def num_pages(self) -> int:
        return self.batch * self.max_pages + 3

    @property
    def max_len(self) -> int:
        return self.page_size * self.max_pages


BATCH = 6
SIZES = tuple(
    Sizes(kind, *{4: (45, BATCH, 6, 14), 128: (500, BATCH, 50, 18), 2: (25, BATCH, 5, 8)}[ratio])
    for kind in KINDS
    for ratio in (kind.compress_ratio,)
)


@dataclasses.dataclass
class Batch:
    """The operands of a call, in the order of ``oracle.ragged_kv_compress``."""

    kv_score: np.ndarray
    ape: np.ndarray | None
    kv: np.ndarray
    score: np.ndarray
    kv_tables: np.ndarray
    score_tables: np.ndarray
    kv_lens: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: np.ndarray | None

    def astuple(self) -> tuple[np.ndarray | None, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


OPERAND_NAMES = tuple(field.name for field in dataclasses.fields(Batch))
STATE = (2, 3)  # the operands that are the state


@functools.cache
def _pools(sizes: Sizes, dtype: str) -> list[np.ndarray]:
    """Two of each: rows of something, for kv and for scores."""
    rng = np.random.default_rng(0)
    shape = sizes.num_pages, sizes.page_size, sizes.kind.state_dim
    return [scale * rng.standard_normal(shape, np.float32).astype(dtype) for scale in (1, 2)]


def make_batch(sizes: Sizes, dtypes: DTypes, regime: str, seed: int | Sequence[int] = 0) -> Batch:
    """Operands in the regime; all rows that nobody is to use are NaN."""
    rng = np.random.default_rng(seed)
    kind, T, B = sizes.kind, sizes.num_rows, sizes.batch
    S = kind.state_dim
    new = rng.standard_normal((T, 2, S), np.float32) * np.array([[1], [2]], np.float32)
    kv, score = (pool.copy() for pool in _pools(sizes, dtypes.state))

    def shuffled_tables() -> np.ndarray:
        pages = rng.permutation(sizes.num_pages)[: B * sizes.max_pages]
        return pages.astype(np.int32).reshape(B, sizes.max_pages)

    x = Batch(
        new.reshape(T, 2 * S).astype(dtypes.kv_score),
        rng.standard_normal((kind.compress_ratio, S), np.float32),
        *(kv, score, shuffled_tables(), shuffled_tables()),
        *(np.zeros(B, np.int32), np.zeros(B + 1, np.int32), np.array(B, np.int32)),
    )
    REGIMES[regime](rng, sizes, x)
    used = np.zeros(T, bool)
    for b, begin, end in oracle.ragged_requests(x.kv_lens, x.cu_q_lens, x.num_seqs, T):
        used[max(begin, end - int(x.kv_lens[b])) : end] = True
    x.kv_score[~used] = np.nan
    return x


# ------------------------------------------------------------------------------------ the regimes


def _chunks(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """So many sizes of chunks, none of them or some 0, of ``total`` rows together."""
    cuts = np.sort(rng.integers(0, total + 1, count - 1))
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _lay_out(x: Batch, n: np.ndarray, starts: np.ndarray, offset: int = 0) -> None:
    """Request b brings ``n[b]`` rows behind ``starts[b]`` old ones."""
    x.cu_q_lens = (offset + np.concatenate([[0], np.cumsum(n)])).astype(np.int32)
    x.kv_lens = (starts + n).astype(np.int32)


def _starts(rng: np.random.Generator, sizes: Sizes, n: np.ndarray) -> np.ndarray:
    """Any that leave room in the tables; a third of them 0."""
    any_start = rng.integers(0, np.maximum(sizes.max_len - n, 0) + 1)
    return np.where(rng.random(len(n)) < 1 / 3, 0, any_start)


def _unaligned(rng: np.random.Generator, sizes: Sizes, x: Batch) -> None:
    """What other regimes start from: chunks of any size behind any number of old rows."""
    n = _chunks(rng, int(rng.integers(0, sizes.num_rows + 1)), sizes.batch)
    _lay_out(x, n, _starts(rng, sizes, n))


def _one_long(rng: np.random.Generator, sizes: Sizes, x: Batch) -> None:
    n = np.zeros(sizes.batch, int)
    n[rng.integers(sizes.batch)] = rng.integers(sizes.num_rows * 3 // 4, sizes.num_rows + 1)
    _lay_out(x, n, _starts(rng, sizes, n))


def _many_tiny(rng: np.random.Generator, sizes: Sizes, x: Batch) -> None:
    """Of 0 to 3 rows, around windows' ends."""
    n = rng.integers(0, 4, sizes.batch)
    R = sizes.kind.compress_ratio
    ends = rng.integers(0, max(sizes.max_len // R, 2), sizes.batch) * R
    _lay_out(x, n, np.maximum(ends + rng.integers(-4, 2, sizes.batch), 0))


def _mixed(rng: np.random.Generator, sizes: Sizes, x: Batch) -> None:
    """Decode steps, and chunks."""
    n = _chunks(rng, sizes.num_rows - 4 * sizes.batch, sizes.batch)
    n = np.where(rng.random(sizes.batch) < 0.6, rng.integers(1, 5, sizes.batch), n)
    _lay_out(x, n, _starts(rng, sizes, n))


def _resumed(rng: np.random.Generator, sizes: Sizes, x: Batch) -> None:
    """All requests share their first pages, which none of them writes."""
    shared = int(rng.integers(1, sizes.max_pages // 2))
    for tables in (x.kv_tables, x.score_tables):
        tables[:, :shared] = tables[0, :shared]
    n = _chunks(rng, sizes.num_rows, sizes.batch)
    n = np.minimum(n, sizes.max_len - shared * sizes.page_size)
    behind = rng.integers(0, sizes.max_pages - shared + 1, sizes.batch) * sizes.page_size
    behind = np.minimum(behind, sizes.max_len - shared * sizes.page_size - n)
    _lay_out(x, n, shared * sizes.page_size + behind)


def _padded(rng: np.random.Generator, sizes: Sizes, x: Batch) -> None:
    """Rows in front of all requests, and behind them."""
    total = int(rng.integers(0, sizes.num_rows))
    n = _chunks(rng, total, sizes.batch)
    _lay_out(x, n, _starts(rng, sizes, n), int(rng.integers(0, sizes.num_rows - total + 1)))


EXTREMES = np.array([INT32_MIN, INT32_MIN + 1, -1, INT32_MAX, INT32_MAX - 1, 1 << 30], np.int32)


def _few_seqs(rng: np.random.Generator, sizes: Sizes, x: Batch) -> None:
    """Fewer requests than B, or as many; garbage behind them."""
    _unaligned(rng, sizes, x)
    there = int(rng.integers(-1, sizes.batch + 2))
    x.num_seqs = np.array(rng.choice([there, there, there, *EXTREMES]), np.int32)
    behind = min(max(int(x.num_seqs), 0), sizes.batch)
    for array in (x.kv_lens, x.kv_tables, x.score_tables):
        array[behind:] = rng.choice([*EXTREMES, 3, 40], array[behind:].shape)
    x.cu_q_lens[behind + 1 :] = rng.choice([*EXTREMES, 3, 40], sizes.batch - behind)


def _wild(rng: np.random.Generator, sizes: Sizes, x: Batch) -> None:
    """``cu_q_lens`` in no order, and out of range; some of it right."""
    _unaligned(rng, sizes, x)
    wild = rng.choice([*EXTREMES, *range(-3, sizes.num_rows + 9)], sizes.batch + 1)
    where = rng.random(sizes.batch + 1) < rng.choice([0.2, 0.5, 1])
    x.cu_q_lens = np.where(where, wild, x.cu_q_lens).astype(np.int32)


def _bad_pages(rng: np.random.Generator, sizes: Sizes, x: Batch) -> None:
    _unaligned(rng, sizes, x)
    for tables in (x.kv_tables, x.score_tables):
        where = rng.random(tables.shape) < rng.choice([0.1, 0.4, 1], (sizes.batch, 1))
        tables[where] = rng.choice([*EXTREMES, sizes.num_pages], np.sum(where))


def _gaps(rng: np.random.Generator, sizes: Sizes, x: Batch) -> None:
    """Requests without rows, rows of inactive requests, and more rows than the length."""
    _unaligned(rng, sizes, x)
    n = np.diff(x.cu_q_lens) * (rng.random(sizes.batch) < 0.6)
    _lay_out(x, n, x.kv_lens - np.diff(x.cu_q_lens))
    short = rng.random(sizes.batch) < 0.5
    lengths = rng.integers(-1, 1 + np.maximum(n, 1))
    x.kv_lens = np.where(short, lengths, x.kv_lens).astype(np.int32)


def _past_table(rng: np.random.Generator, sizes: Sizes, x: Batch) -> None:
    """Lengths beyond what the tables hold, up to the last int32."""
    _unaligned(rng, sizes, x)
    end, R = sizes.max_len, sizes.kind.compress_ratio
    near = end + rng.integers(-3, 2 * R, sizes.batch)
    far = INT32_MAX - rng.integers(0, 2 * R, sizes.batch)
    x.kv_lens = np.where(rng.random(sizes.batch) < 0.5, near, far).astype(np.int32)


def _minus_inf(rng: np.random.Generator, sizes: Sizes, x: Batch) -> None:
    """Scores of single rows, of runs of rows, and of half of the pool."""
    _unaligned(rng, sizes, x)
    new_scores = x.kv_score[:, sizes.kind.state_dim :]
    new_scores[rng.random(sizes.num_rows) < 0.3] = -np.inf
    first = int(rng.integers(sizes.num_rows))
    new_scores[first : first + 2 * sizes.kind.compress_ratio] = -np.inf
    pages = x.kv_tables[::2], x.score_tables[::2]
    x.kv[pages[0]], x.score[pages[1]] = 0, -np.inf


REGIMES: dict[str, Callable[[np.random.Generator, Sizes, Batch], None]] = {
    "unaligned": _unaligned,
    "one_long": _one_long,
    "many_tiny": _many_tiny,
    "mixed": _mixed,
    "resumed": _resumed,
    "padded": _padded,
    "few_seqs": _few_seqs,
    "wild": _wild,
    "bad_pages": _bad_pages,
    "gaps": _gaps,
    "past_table": _past_table,
    "minus_inf": _minus_inf,
}

# ------------------------------------------------------------------------------- runs and checks


def store_rules(kind: Kind) -> tuple[str | LiveRows, ...]:
    R = kind.compress_ratio
    return "all", live(max_rewind=3), live(max_rewind=R + 1, resume_every=3 * R // 2)


@functools.cache
def call(
    kind: Kind,
    dtypes: DTypes,
    state_format: str,
    store_rows: str | LiveRows,
    implementation: str | None,
) -> Callable[..., Results]:
    """The call from a ``Batch``, as a tuple, and a layer; jitted, on donated pools."""

    def call(
        kv_score, ape, kv, score, kv_tables, score_tables, kv_lens, cu_q_lens, num_seqs, layer=None
    ):
        kv_comp, state = ragged_kv_compress(
            kv_score,
            ape,
            CompressorState(kv, score, state_format),
            kv_tables if score_tables is None else (kv_tables, score_tables),
            kv_lens,
            cu_q_lens,
            num_seqs=num_seqs,
            compress_ratio=kind.compress_ratio,
            overlap=kind.overlap,
            layer=layer,
            store_rows=store_rows,
            out_dtype=dtypes.out,
            implementation=implementation,
        )
        return Results(state.kv, state.score, kv_comp)

    return call


@functools.cache
def jitted(*options) -> Callable[..., Results]:
    """Most of a reference's time on a CPU is LLVM's, so that is told to hurry."""
    hurry = options[-1] == "xla" and jax.default_backend() == "cpu"
    options_of_compiler = {"xla_backend_optimization_level": 0} if hurry else None
    return jax.jit(call(*options), donate_argnums=STATE, compiler_options=options_of_compiler)


def run(batch: Batch, *options) -> Results:
    arrays = [None if x is None else jnp.array(x) for x in batch.astuple()]
    return Results(*map(np.asarray, jitted(*options)(*arrays)))


def expected(batch: Batch, kind: Kind, state_format: str, store_rows: str | LiveRows) -> Results:
    """In float64; a raw state rounded to its dtype."""
    rule = store_rows
    if isinstance(rule, LiveRows):
        rule = rule.max_rewind, rule.resume_every
    return Results(
        *oracle.ragged_kv_compress(
            *batch.astuple(),
            ratio=kind.compress_ratio,
            overlap=kind.overlap,
            state_format=state_format,
            store_rows=None if rule == "all" else rule,
        )
    )


def check(got: Results, want: Results, batch: Batch, state_format: str) -> None:
    """Rows and values as of a decode step; rows that are not stored have their bits."""
    check_results(got, want, state_format)
    for name in ("kv", "score"):
        before, after = getattr(batch, name), getattr(want, name)
        same = np.all(bits(after.astype(before.dtype)) == bits(before), axis=-1)
        check_same_bits(getattr(got, name)[same], before[same])


def check_random(seed: int, implementations: Sequence[str]) -> None:
    """One batch: of every size, regime, state format and rule in turn."""
    sizes = SIZES[seed % len(SIZES)]
    rng = np.random.default_rng([seed, 0])
    state_format = ("raw", "prefix")[rng.integers(2)]
    rules = store_rules(sizes.kind)
    store_rows = rules[rng.integers(len(rules))]
    dtypes = cases.BF16_IN_F32_STATE
    if state_format == "raw" and seed % 2:
        dtypes = cases.F32_IN_BF16_STATE
    regime = tuple(REGIMES)[rng.integers(len(REGIMES))]
    batch = make_batch(sizes, dtypes, regime, [seed, 1])
    want = expected(batch, sizes.kind, state_format, store_rows)
    for implementation in implementations:
        options = sizes.kind, dtypes, state_format, store_rows, implementation
        try:
            check(run(batch, *options), want, batch, state_format)
        except AssertionError as error:
            error.add_note(f"seed {seed}: {regime}, {options}")
            raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="how many batches")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first one")
    parser.add_argument("--implementation", action="append", choices=("ffi", "xla"))
    given = parser.parse_args()
    began = time.monotonic()
    for seed in range(given.first, given.first + given.count):
        check_random(seed, given.implementation or ("ffi", "xla"))
    print(f"{given.count} batches in {time.monotonic() - began:.0f} s")
