"""Ragged batches: numbers, and which rows are stored."""

import dataclasses
import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import ragged_batches
from cases import INT32_MAX, INT32_MIN
from checks import Results, check_close, check_same_bits
from ragged_batches import REGIMES, SIZES, call, check, expected, make_batch, run, store_rules
from test_errors import spec

from jax_dsv4 import (
    CompressorState,
    LiveRows,
    _config,
    live,
    paged_kv_compress,
    ragged_kv_compress,
    ragged_windows,
)
from jax_dsv4.reference.ragged import is_stored

pytestmark = pytest.mark.usefixtures("on_device")
IMPLEMENTATIONS = ("ffi", "xla")
FORMATS = ("raw", "prefix")
DTYPES = cases.BF16_IN_F32_STATE
SMALL = tuple(sizes for sizes in SIZES if sizes.kind in cases.SMALL_KINDS)
of_small = pytest.mark.parametrize("sizes", SMALL, ids=lambda sizes: str(sizes.kind))
in_formats = pytest.mark.parametrize("state_format", FORMATS)
by_both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def rule_of(sizes, index):
    return store_rules(sizes.kind)[index]


# -------------------------------------------------------------------------------- against float64


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("rule", range(3), ids=("all", "live", "live, resume"))
@in_formats
@of_small
def test_random_batches_agree_with_float64(sizes, state_format, rule, regime):
    rule = rule_of(sizes, rule)
    batch = make_batch(sizes, DTYPES, regime, 0)
    want = expected(batch, sizes.kind, state_format, rule)
    for implementation in IMPLEMENTATIONS:
        got = run(batch, sizes.kind, DTYPES, state_format, rule, implementation)
        check(got, want, batch, state_format)


@pytest.mark.parametrize("dtypes", _config.DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: str(sizes.kind))
def test_every_configuration_agrees_with_float64(sizes, dtypes):
    for state_format in FORMATS if dtypes.state == "float32" else ("raw",):
        batch = make_batch(sizes, dtypes, "unaligned", 5)
        want = expected(batch, sizes.kind, state_format, "all")
        # Of the reference, that new rows count as rounded to the state's dtype.
        rounds = sizes in SMALL and dtypes == cases.F32_IN_BF16_STATE
        for implementation in IMPLEMENTATIONS if rounds else ("ffi",):
            got = run(batch, sizes.kind, dtypes, state_format, "all", implementation)
            check(got, want, batch, state_format)
        assert np.any(want.kv_comp)


def test_random_batches_of_every_kind_agree_with_float64():
    for seed in range(40):
        ragged_batches.check_random(seed, ("ffi",))


@in_formats
@by_both
@of_small
def test_decode_steps_have_the_bits_of_a_decode_call(sizes, implementation, state_format):
    """Every request brings ``next_n`` rows; values are at other places."""
    next_n, B, R = 3, sizes.batch, sizes.kind.compress_ratio
    batch = make_batch(sizes, DTYPES, "unaligned", 1)
    batch.kv_score = np.resize(
        batch.kv_score[~np.isnan(batch.kv_score)], (B * next_n, 2 * sizes.kind.state_dim)
    )
    batch.cu_q_lens = np.arange(B + 1, dtype=np.int32) * next_n
    batch.kv_lens = np.array([R, R + 1, R + 2, 2 * R - 1, next_n, 2], np.int32)
    got = run(batch, sizes.kind, DTYPES, state_format, "all", implementation)
    values, state = paged_kv_compress(
        batch.kv_score.reshape(B, next_n, -1),
        batch.ape,
        CompressorState(batch.kv, batch.score, state_format),
        (batch.kv_tables, batch.score_tables),
        batch.kv_lens,
        compress_ratio=R,
        overlap=sizes.kind.overlap,
        out_dtype=DTYPES.out,
        implementation=implementation,
    )
    want = np.zeros_like(got.kv_comp)
    windows = ragged_windows(
        batch.cu_q_lens, batch.kv_lens, num_rows=len(batch.kv_score), compress_ratio=R
    )
    for row, (request, window) in enumerate(zip(*map(np.asarray, windows), strict=True)):
        if request >= 0:
            first = max(batch.kv_lens[request] - next_n, 0) // R
            want[row] = values[request, window - first]
    want = Results(np.asarray(state.kv), np.asarray(state.score), want)
    assert np.any(want.kv_comp)
    check(got, want, batch, state_format)


# ------------------------------------------------------------------------------ however it is cut


def calls_of(sizes, tokens, cut):
    """``cut`` gives each request's next number of rows, from what is left -> one call's rows."""
    lengths = np.zeros(len(tokens), int)
    while np.any(lengths < list(map(len, tokens))):
        n = np.zeros(sizes.batch, int)
        room = sizes.num_rows
        for b, own in enumerate(tokens):
            n[b] = min(cut(len(own) - lengths[b]), room)
            room -= n[b]
        rows = [own[at : at + count] for own, at, count in zip(tokens, lengths, n, strict=True)]
        lengths = lengths + n
        yield rows, lengths


def run_in_calls(sizes, tokens, cut, implementation, state_format, store_rows="all"):
    """All tokens, from an empty state -> the operands of the last call, and values by window."""
    batch = make_batch(sizes, DTYPES, "unaligned", 0)
    batch.kv[:], batch.score[:] = np.nan, np.nan
    values = {}
    for rows, lengths in calls_of(sizes, tokens, cut):
        flat = np.concatenate(rows)
        batch.kv_score = np.full_like(batch.kv_score, np.nan)
        batch.kv_score[: len(flat)] = flat
        batch.cu_q_lens = np.cumsum([0, *map(len, rows)]).astype(np.int32)
        batch.kv_lens = lengths.astype(np.int32)
        got = run(batch, sizes.kind, DTYPES, state_format, store_rows, implementation)
        batch.kv, batch.score = got.kv, got.score
        values |= values_by_window(sizes, batch, got.kv_comp)
    return batch, values


def values_by_window(sizes, batch, kv_comp):
    ratio = sizes.kind.compress_ratio
    windows = ragged_windows(
        batch.cu_q_lens, batch.kv_lens, num_rows=len(batch.kv_score), compress_ratio=ratio
    )
    np.testing.assert_array_equal(kv_comp[np.asarray(windows.window) < 0], 0)
    return {
        (int(b), int(w)): value for b, w, value in zip(*windows, kv_comp, strict=True) if b >= 0
    }


def tokens_of(sizes, lengths, seed=0):
    rng = np.random.default_rng(seed)
    width = 2 * sizes.kind.state_dim
    return [rng.standard_normal((n, width), np.float32).astype(DTYPES.kv_score) for n in lengths]


@in_formats
@by_both
@of_small
def test_a_prompt_may_be_cut_anywhere(sizes, implementation, state_format):
    """In one piece, in random chunks, token by token: the same rows, and values that are close."""
    R = sizes.kind.compress_ratio
    tokens = tokens_of(sizes, [R + 3, 0, 2 if R == 2 else R - 1, 1, R, R + 2])
    rng = np.random.default_rng(0)
    cuts = {
        "one piece": lambda left: left,
        "chunks": lambda left: int(rng.integers(0, left + 1)),
        "tokens": lambda left: min(left, 1),
    }
    runs = {
        name: run_in_calls(sizes, tokens, cut, implementation, state_format)
        for name, cut in cuts.items()
    }
    want, want_values = runs.pop("one piece")
    assert len(want_values) >= 3
    for batch, values in runs.values():
        assert values.keys() == want_values.keys()
        for window, value in values.items():
            check_close(value, want_values[window])
        for name in ("kv", "score"):
            got, rows = getattr(batch, name), getattr(want, name)
            if state_format == "raw":
                check_same_bits(got, rows)
            else:
                np.testing.assert_allclose(got, rows, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------- rows that are live


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (4, False), (2, False), (3, True)])
@in_formats
def test_a_step_reads_what_the_rule_says(state_format, ratio, overlap):
    """By poisoning each row before it."""
    decode = {"raw": oracle.paged_kv_compress, "prefix": oracle.paged_kv_compress_on_prefixes}
    next_n, size = 2 * ratio, 5 * ratio
    tables = np.arange(size)[None]
    rows = np.ones((1, next_n, 4 if not overlap else 8), np.float32)
    for start in range(3 * ratio + 1):
        read = set()
        for poisoned in range(start):
            pool = np.ones((size, 1, rows.shape[-1] // 2), np.float32)
            pool[poisoned] = np.nan
            *_, values = decode[state_format](
                *(rows, None, pool, pool, tables, tables, [start + next_n], None),
                ratio=ratio,
                overlap=overlap,
            )
            if np.isnan(values).any():
                read.add(poisoned)
        rule = {"ratio": ratio, "overlap": overlap, "state_format": state_format}
        assert oracle.rows_read(start, **rule) == read


@in_formats
@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (2, False), (128, False)])
def test_the_rule_without_a_loop_is_the_rule(ratio, overlap, state_format):
    kind = {"ratio": ratio, "overlap": overlap, "state_format": state_format}
    lengths = {4: range(1, 18), 2: range(1, 12), 128: [1, 2, 127, 128, 129, 255, 256, 257, 399]}[
        ratio
    ]
    rule_at = jax.jit(is_stored, static_argnames=(*kind, "max_rewind", "resume_every"))
    positions = np.arange(max(lengths))
    rewinds = (0, 1, 3, ratio - 1, ratio, ratio + 1, 2 * ratio + 1, INT32_MAX)
    for k, e in itertools.product(dict.fromkeys(rewinds), (None, 1, 3, ratio, 7, 96, INT32_MAX)):
        for length in lengths:
            got = rule_at(
                positions,
                np.int32(length),
                **kind,
                max_rewind=k,
                resume_every=e or 0,
            )
            for start in {0, length // 2, length - 1}:
                want = oracle.rows_stored(start, length, (min(k, length), e), **kind)
                assert set(np.flatnonzero(got[start:length]) + start) == want, (k, e, length)


@pytest.mark.parametrize("rule", (1, 2), ids=("live", "live, resume"))
@in_formats
@by_both
@of_small
def test_what_is_stored_is_enough(sizes, implementation, state_format, rule):
    """Chunks, rewinds and resumed prefixes, from a state of NaN: no value reads a row of it."""
    rule = rule_of(sizes, rule)
    rng = np.random.default_rng(3)
    tokens = tokens_of(sizes, [sizes.max_len] * sizes.batch)
    batch = make_batch(sizes, DTYPES, "unaligned", 0)
    batch.kv[:], batch.score[:] = np.nan, np.nan
    want = whole_values(sizes, tokens, batch.ape)
    lengths = np.zeros(sizes.batch, int)  # and the lowest that a step may start from
    floors, resumed, rewound, compared = lengths.copy(), 0, 0, 0
    for _ in range(30):
        starts = np.array([rng.integers(f, n + 1) for f, n in zip(floors, lengths, strict=True)])
        for b in range(sizes.batch):
            if rule.resume_every is not None and rng.random() < 0.2:
                multiple = rule.resume_every * rng.integers(lengths[b] // rule.resume_every + 1)
                starts[b] = floors[b] = lengths[b] = multiple
                resumed += multiple > 0
                for p in range(multiple, sizes.max_len):  # a request that shares what is before it
                    page, slot = divmod(p, sizes.page_size)
                    batch.kv[batch.kv_tables[b, page], slot] = np.nan
                    batch.score[batch.score_tables[b, page], slot] = np.nan
        n = ragged_batches._chunks(rng, sizes.num_rows, sizes.batch)
        n = np.minimum(n, sizes.max_len - starts) * (rng.random(sizes.batch) < 0.8)
        starts = np.where(n > 0, starts, lengths)
        rewound += int(np.sum(starts < lengths))
        rows = [tokens[b][starts[b] : starts[b] + n[b]] for b in range(sizes.batch)]
        batch.kv_score = np.full_like(batch.kv_score, np.nan)
        batch.kv_score[: n.sum()] = np.concatenate(rows)
        ragged_batches._lay_out(batch, n, starts)
        got = run(batch, sizes.kind, DTYPES, state_format, rule, implementation)
        batch.kv, batch.score = got.kv.copy(), got.score.copy()
        for (b, window), value in values_by_window(sizes, batch, got.kv_comp).items():
            check_close(value, want[b][window])
            compared += 1
        lengths = starts + n
        floors = np.maximum(floors, lengths - rule.max_rewind)
        floors = np.minimum(floors, lengths)
    assert rewound > 5 and compared > 20
    assert resumed or rule.resume_every is None


def whole_values(sizes, tokens, ape):
    """Of each request, all windows' values in float64."""
    values = []
    for own in tokens:
        pool = np.zeros((len(own), 1, sizes.kind.state_dim), np.float32)
        table = np.arange(len(own))[None]
        *_, kv_comp = oracle.paged_kv_compress(
            *(own[None], ape, pool, pool, table, table, [len(own)], None),
            ratio=sizes.kind.compress_ratio,
            overlap=sizes.kind.overlap,
        )
        values.append(kv_comp[0])
    return values


@in_formats
@by_both
@of_small
def test_live_rows_need_no_page_for_what_is_not_stored(sizes, implementation, state_format):
    """With pages for the last rows only, and others' pages in place of the dead ones."""
    rule = live(max_rewind=0)
    batch = make_batch(sizes, DTYPES, "one_long", 2)
    b = int(np.argmax(np.diff(batch.cu_q_lens)))
    n = np.diff(batch.cu_q_lens)
    ragged_batches._lay_out(batch, n, np.zeros(sizes.batch, int))
    whole = run(batch, sizes.kind, DTYPES, state_format, rule, implementation)
    first = (int(batch.kv_lens[b]) // sizes.kind.compress_ratio - 1) * sizes.kind.compress_ratio
    dead = max(first, 0) // sizes.page_size
    other = (b + 1) % sizes.batch
    for ids in (-1, INT32_MAX, batch.kv_tables[other, 0]):
        given = dataclasses.replace(batch, kv_tables=batch.kv_tables.copy())
        given.kv_tables[b, :dead] = ids
        got = run(given, sizes.kind, DTYPES, state_format, rule, implementation)
        np.testing.assert_array_equal(got.kv, whole.kv)
        np.testing.assert_array_equal(got.kv_comp, whole.kv_comp)
    assert dead > 0


@in_formats
@by_both
def test_live_rows_need_no_pool(implementation, state_format):
    """New rows count where the pool or the tables are empty; with "all" they do not."""
    sizes = SMALL[0]
    batch = make_batch(sizes, DTYPES, "one_long", 2)
    ragged_batches._lay_out(batch, np.diff(batch.cu_q_lens), np.zeros(sizes.batch, int))
    options = sizes.kind, DTYPES, state_format
    want = run(batch, *options, live(max_rewind=0), implementation).kv_comp
    assert np.any(want)
    no_pages = dataclasses.replace(batch, kv=batch.kv[:0], score=batch.score[:0])
    tables = {"kv_tables": batch.kv_tables[:, :0], "score_tables": batch.score_tables[:, :0]}
    for nowhere in (no_pages, dataclasses.replace(batch, **tables)):
        got = run(nowhere, *options, live(max_rewind=0), implementation)
        check_close(got.kv_comp, want)
        check_same_bits(got.kv, nowhere.kv)
        got = run(nowhere, *options, "all", implementation)
        np.testing.assert_array_equal(got.kv_comp, 0)
        check_same_bits(got.score, nowhere.score)


@in_formats
@by_both
@of_small
def test_rows_that_are_not_stored_may_share_a_row(sizes, implementation, state_format):
    """A slot's ring of few pages: a prompt in chunks, each longer than the ring."""
    R, page = sizes.kind.compress_ratio, sizes.page_size
    rule = live(max_rewind=0)
    ring = -(-(2 * R + page) // page) + 1
    tokens = tokens_of(sizes, [min(sizes.max_len, 3 * sizes.num_rows)] + [0] * (sizes.batch - 1))
    want = whole_values(sizes, tokens[:1], make_batch(sizes, DTYPES, "unaligned", 0).ape)[0]
    batch = make_batch(sizes, DTYPES, "unaligned", 0)
    batch.kv[:], batch.score[:] = np.nan, np.nan
    at = np.arange(sizes.max_pages) % ring
    batch.kv_tables[0], batch.score_tables[0] = batch.kv_tables[0, at], batch.score_tables[0, at]

    def read_before(length):
        """The ring's rows that a step from this length on may read."""
        first = (length // R - sizes.kind.overlap) * R
        return {p % (ring * page) for p in range(max(first, 0), length)}

    length, seen = 0, 0
    rng = np.random.default_rng(1)
    while length < len(tokens[0]):
        n = min(int(rng.integers(1, sizes.num_rows + 1)), len(tokens[0]) - length)
        if read_before(length) & read_before(length + n):
            continue  # a row that is stored would be one that is read
        batch.kv_score = np.full_like(batch.kv_score, np.nan)
        batch.kv_score[:n] = tokens[0][length : length + n]
        ragged_batches._lay_out(batch, np.array([n, 0, 0, 0, 0, 0]), np.array([length] + [0] * 5))
        got = run(batch, sizes.kind, DTYPES, state_format, rule, implementation)
        batch.kv, batch.score = got.kv, got.score
        for (_, window), value in values_by_window(sizes, batch, got.kv_comp).items():
            check_close(value, want[window])
            seen += 1
        length += n
    assert seen == length // R


# ----------------------------------------------------------------------------------- other operands


@functools.cache
def one_batch(state_format):
    sizes = SMALL[0]
    batch = make_batch(sizes, DTYPES, "mixed", 7)
    return sizes, batch, expected(batch, sizes.kind, state_format, "all")


@in_formats
@by_both
def test_a_pair_of_rows_one_table_and_no_ape(implementation, state_format):
    sizes, batch, _ = one_batch(state_format)
    batch = dataclasses.replace(batch, ape=None, score_tables=batch.kv_tables, num_seqs=None)
    want = expected(batch, sizes.kind, state_format, "all")
    kv_score, *others = batch.astuple()
    others[4] = None
    step = call(sizes.kind, DTYPES, state_format, "all", implementation)
    pair = tuple(np.split(kv_score, 2, axis=-1))
    for rows in (kv_score, pair):
        check(Results(*map(np.asarray, step(rows, *others))), want, batch, state_format)


@pytest.mark.parametrize("layer", (0, 2, np.int64(1), jnp.int32(2), 3, -1, jnp.int32(-1), 2**40))
@in_formats
@by_both
def test_a_layer_is_worked_on_alone(implementation, state_format, layer):
    sizes, batch, want = one_batch(state_format)
    pools = [np.stack([x + i for i in range(3)]) for x in (batch.kv, batch.score)]
    index = int(layer)
    if 0 <= index < 3:
        pools[0][index], pools[1][index] = batch.kv, batch.score
    given = dataclasses.replace(batch, kv=pools[0], score=pools[1])
    step = call(sizes.kind, DTYPES, state_format, "all", implementation)
    kv, score, kv_comp = map(np.asarray, step(*given.astuple(), layer))
    for i in range(3):
        if i == index:
            check(Results(kv[i], score[i], kv_comp), want, batch, state_format)
        else:
            check_same_bits(kv[i], pools[0][i])
            check_same_bits(score[i], pools[1][i])
    if not 0 <= index < 3:
        np.testing.assert_array_equal(kv_comp, 0)


@in_formats
@by_both
@pytest.mark.parametrize("empty", ("rows", "requests", "both", "fewer rows than a window"))
def test_empty_dimensions_are_served(implementation, state_format, empty):
    sizes, batch, _ = one_batch(state_format)
    if empty == "fewer rows than a window":
        rows = np.ones_like(batch.kv_score[:1])
        cu = np.minimum(batch.cu_q_lens, 1)
        batch = dataclasses.replace(batch, kv_score=rows, cu_q_lens=cu)
    if empty in ("rows", "both"):
        batch = dataclasses.replace(batch, kv_score=batch.kv_score[:0])
    if empty in ("requests", "both"):
        none = {k: getattr(batch, k)[:0] for k in ("kv_tables", "score_tables", "kv_lens")}
        batch = dataclasses.replace(batch, **none, cu_q_lens=batch.cu_q_lens[:1])
    want = expected(batch, sizes.kind, state_format, "all")
    got = run(batch, sizes.kind, DTYPES, state_format, "all", implementation)
    check(got, want, batch, state_format)


def test_a_static_rule_is_equal_where_its_fields_are():
    assert live(max_rewind=np.int64(3), resume_every=np.int32(8)) == LiveRows(3, 8)
    assert hash(live(max_rewind=3)) == hash(LiveRows(3))
    assert live(max_rewind=3) != live(max_rewind=3, resume_every=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        live(max_rewind=3).max_rewind = 4


# --------------------------------------------------------------------------------- ragged_windows


@pytest.mark.parametrize(("ratio", "overlap"), [(4, None), (2, False), (128, True)])
def test_ragged_windows_are_those_that_end_in_the_new_rows(ratio, overlap):
    T, B = 40 if ratio < 128 else 300, 5
    program = jax.jit(
        functools.partial(ragged_windows, num_rows=T, compress_ratio=ratio, overlap=overlap)
    )
    rng = np.random.default_rng(0)
    wild = [*range(-2, T + 3), INT32_MIN, INT32_MAX]
    total = 0
    for trial in range(300):
        cu = rng.integers(0, T + 1, B + 1)
        cu = rng.choice(wild, B + 1) if trial % 3 == 0 else np.sort(cu)
        far = [INT32_MIN, INT32_MAX, INT32_MAX - ratio, 0]
        lens = np.where(rng.random(B) < 0.2, rng.choice(far, B), rng.integers(1, 3 * T, B))
        there = int(rng.integers(-1, B + 2))
        got = program(cu.astype(np.int32), lens.astype(np.int32), num_seqs=np.int32(there))
        assert [x.dtype for x in got] == [jnp.int32] * 2
        want = np.full((2, T // ratio + B), -1)
        for b, begin, end in oracle.ragged_requests(lens, cu, there, T):
            start = max(lens[b] - (end - begin), 0)
            windows = range(start // ratio, lens[b] // ratio)
            first = begin // ratio + b
            assert np.all(want[:, first : first + len(windows)] == -1), "two windows in a row"
            want[0, first : first + len(windows)] = b
            want[1, first : first + len(windows)] = windows
            total += len(windows)
        np.testing.assert_array_equal(np.stack(got), want)
    assert total > 100
    request, window = ragged_windows([0, 4], [4], num_rows=4, compress_ratio=4)
    assert (request.tolist(), window.tolist()) == ([0, -1], [0, -1])


# ----------------------------------------------------------------------------------------- errors


def good_arguments():
    return {
        "kv_score": spec(9, 512, dtype=jnp.bfloat16),
        "ape": spec(4, 256),
        "state": CompressorState(spec(5, 8, 256), spec(5, 8, 256)),
        "block_tables": spec(3, 6, dtype=jnp.int32),
        "kv_lens": spec(3, dtype=jnp.int32),
        "cu_q_lens": spec(4, dtype=jnp.int32),
        "num_seqs": spec(dtype=jnp.int32),
    }


def trace(compress_ratio=4, store_rows="all", implementation=None, **changed):
    arguments = good_arguments() | changed
    given = {k: v for k, v in arguments.items() if not isinstance(v, (int, float, np.ndarray))}
    static = {k: v for k, v in arguments.items() if k not in given}
    options = {"compress_ratio": compress_ratio, "store_rows": store_rows}
    return jax.eval_shape(
        lambda arrays: ragged_kv_compress(
            **arrays, **static, **options, implementation=implementation
        ),
        given,
    )


@pytest.mark.parametrize("implementation", (None, *IMPLEMENTATIONS))
@pytest.mark.parametrize("store_rows", ("all", live(max_rewind=2)), ids=str)
def test_eval_shape_follows_the_operands(implementation, store_rows):
    kv_comp, state = trace(implementation=implementation, store_rows=store_rows)
    assert (kv_comp.shape, kv_comp.dtype) == ((9 // 4 + 3, 128), jnp.bfloat16)
    assert (state.kv.shape, state.kv.dtype) == ((5, 8, 256), jnp.float32)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("kv_score", spec(3, 3, 512), ValueError),
        ("kv_score", spec(9, 256), ValueError),
        ("kv_score", spec(9, 512, dtype=jnp.float16), TypeError),
        ("ape", spec(3, 256), ValueError),
        ("block_tables", spec(4, 6, dtype=jnp.int32), ValueError),
        ("kv_lens", spec(3, 1, dtype=jnp.int32), ValueError),
        ("kv_lens", spec(3), TypeError),
        ("cu_q_lens", spec(3, dtype=jnp.int32), ValueError),
        ("cu_q_lens", spec(4), TypeError),
        ("cu_q_lens", np.zeros(4, np.int64), TypeError),
        ("num_seqs", spec(1, dtype=jnp.int32), ValueError),
        ("num_seqs", spec(), TypeError),
        ("num_seqs", 2.5, TypeError),
        ("store_rows", "live", ValueError),
        ("store_rows", None, ValueError),
        ("store_rows", 3, ValueError),
        ("compress_ratio", 5, ValueError),
        ("implementation", "cuda", ValueError),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(name, value, error):
    with pytest.raises(error, match=f"^{name}: expected "):
        trace(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("max_rewind", -1, ValueError),
        ("max_rewind", 2**31, ValueError),
        ("max_rewind", 1.5, TypeError),
        ("max_rewind", jnp.int32(1), TypeError),
        ("resume_every", 0, ValueError),
        ("resume_every", 2**31, ValueError),
        ("resume_every", "8", TypeError),
    ],
    ids=str,
)
def test_a_wrong_rule_is_named(name, value, error):
    with pytest.raises(error, match=f"^{name}: expected "):
        live(**{"max_rewind": 3} | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("cu_q_lens", np.zeros(3, np.int32), ValueError),
        ("kv_lens", np.zeros(3, np.int64), TypeError),
        ("num_rows", -1, ValueError),
        ("num_rows", jnp.int32(4), TypeError),
        ("num_seqs", np.zeros(1, np.int32), ValueError),
        ("compress_ratio", 0, ValueError),
        ("overlap", 1, TypeError),
    ],
    ids=str,
)
def test_ragged_windows_names_a_wrong_argument(name, value, error):
    good = {"cu_q_lens": np.zeros(4, np.int32), "kv_lens": np.zeros(3, np.int32)}
    with pytest.raises(error, match=f"^{name}: expected "):
        ragged_windows(**good | {"num_rows": 9, "compress_ratio": 4} | {name: value})
