"""Decode that ends in records: the same as its parts, for one compressor and for several."""

import contextlib
import dataclasses
import functools
import re

import cases
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import COLLECTIVE, check_same_bits, with_or_without_cuda
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_matrix import MESHES, MODES, in_mode

from jax_dsv4 import (
    EXPORT_DISABLED_CHECKS,
    CacheTables,
    Compressor,
    CompressorCache,
    CompressorState,
    _ffi,
    decode_records,
    dequantize_records,
    init_records,
    init_state,
    paged_kv_compress,
    store_records,
)
from jax_dsv4.compressor import decode_records_of

BATCH, NEXT_N = 5, 3
STATE_PAGE, RECORD_PAGE = 8, 3
KINDS = {  # of a layer's compressors: head_dim, compress_ratio, records, options
    "main": (512, 4, {"format": "fp8_ds_mla"}, {}),
    "indexer": (128, 4, {"format": "fp8_block128"}, {"hadamard": True}),
    "hca": (512, 128, {"format": "bf16"}, {"rope_layout": "interleaved", "rounding": "model"}),
    "hca, mxfp4": (128, 128, {"format": "mxfp4"}, {"rms_norm_eps": 1e-3}),
    "next": (512, 2, {"format": "fp8_ds_mla", "scale_floor": True}, {}),
}


def make_compressor(name, seed=0):
    head_dim, ratio, _, options = KINDS[name]
    rng = np.random.default_rng(seed)
    state_dim = head_dim * (2 if ratio == 4 else 1)
    angles = rng.standard_normal((400, 32))
    table = np.concatenate((np.cos(angles), np.sin(angles)), -1).astype(np.float32)
    return Compressor(
        rng.standard_normal((ratio, state_dim), np.float32),
        rng.standard_normal(head_dim, np.float32),
        table,
        head_dim,
        ratio,
        **options,
    )


def make_cache(name, state_format="raw", layers=None, seed=0):
    """An empty state, records full of something, and tables of pages in no order."""
    head_dim, ratio, records, _ = KINDS[name]
    rng = np.random.default_rng(seed)
    pages, record_pages = 420 // STATE_PAGE, -(-420 // ratio // RECORD_PAGE)
    num_pages, num_record_pages = BATCH * pages + 2, BATCH * record_pages + 3
    state = init_state(
        num_pages,
        STATE_PAGE,
        head_dim=head_dim,
        compress_ratio=ratio,
        format=state_format,
        layers=layers,
    )
    cache = init_records(num_record_pages, RECORD_PAGE, head_dim=head_dim, layers=layers, **records)
    cache = dataclasses.replace(cache, pool=jnp.full(cache.pool.shape, 0xA5, jnp.uint8))
    tables = CacheTables(
        rng.permutation(num_pages)[: BATCH * pages].reshape(BATCH, pages).astype(np.int32),
        rng.permutation(num_record_pages)[: BATCH * record_pages]
        .reshape(BATCH, record_pages)
        .astype(np.int32),
    )
    return CompressorCache(state, cache), tables


def make_rows(name, seed=0, next_n=NEXT_N):
    head_dim, ratio, *_ = KINDS[name]
    width = 2 * head_dim * (2 if ratio == 4 else 1)
    rows = np.random.default_rng(seed).standard_normal((BATCH, next_n, width), np.float32)
    return jnp.asarray(rows, jnp.bfloat16)


LENS = np.array([4, 130, 0, 256, 391], np.int32)
Q_LENS = np.array([3, 2, 3, 1, 0], np.int32)


def by_parts(kv_score, c, cache, tables, kv_lens, q_lens=None, implementation=None):
    """The values of ``paged_kv_compress``, each stored in the slot that a loop finds for it."""
    values, state = paged_kv_compress(
        kv_score,
        c.ape,
        cache.state,
        tables.state,
        kv_lens,
        compress_ratio=c.compress_ratio,
        overlap=c.overlap,
        q_lens=q_lens,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    records = cache.records
    slots, positions = np.full((2, *values.shape[:2]), -1, np.int32)
    for b in range(len(kv_lens)):
        n = kv_score.shape[1] if q_lens is None else min(max(q_lens[b], 0), kv_score.shape[1])
        if n == 0 or kv_lens[b] <= 0:
            continue
        first = max(kv_lens[b] - n, 0) // c.compress_ratio
        for m, window in enumerate(range(first, kv_lens[b] // c.compress_ratio)):
            logical, row = divmod(window, records.page_size)
            page = tables.records[b, logical] if logical < tables.records.shape[1] else -1
            positions[b, m] = window * c.compress_ratio
            if 0 <= page < records.pool.shape[0]:
                slots[b, m] = page * records.page_size + row
    values = values.reshape(-1, c.head_dim)
    records = store_values(values, slots.ravel(), positions.ravel(), records, c, implementation)
    return CompressorCache(state, records), np.sum(slots >= 0)


def store_values(values, slots, positions, records, c, implementation):
    """As a compressor makes its records."""
    return store_records(
        *(values, slots, positions, records),
        norm_weight=c.norm_weight,
        cos_sin_cache=c.cos_sin_cache,
        rms_norm_eps=c.rms_norm_eps,
        rope_layout=c.rope_layout,
        hadamard=c.hadamard,
        rounding=c.rounding,
        implementation=implementation,
    )


def check_equal(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        if x.dtype == np.uint8:
            np.testing.assert_array_equal(x, y)
        else:
            check_same_bits(x, y)


LAYER = ("main", "indexer", "hca, mxfp4")  # compressors of one call, of two ratios
LAYER_FORMATS = ("raw", "prefix", "raw")


def make_layer(layers=None, seed=0):
    """Rows as one array, compressors, caches and tables of ``LAYER``."""
    compressors = tuple(make_compressor(name, seed + i) for i, name in enumerate(LAYER))
    made = (
        make_cache(name, state_format, layers, seed + i)
        for i, (name, state_format) in enumerate(zip(LAYER, LAYER_FORMATS, strict=True))
    )
    caches, tables = zip(*made, strict=True)
    rows = [make_rows(name, seed + i) for i, name in enumerate(LAYER)]
    return jnp.concatenate(rows, axis=-1), compressors, caches, tables


def split_rows(rows):
    """The rows of each of ``LAYER``."""
    widths = [2 * make_compressor(name).state_dim for name in LAYER]
    return jnp.split(rows, np.cumsum(widths)[:-1], axis=-1)


def each_alone(rows, compressors, caches, tables, **keywords):
    """What a call for all of them gives, by a call for each."""
    given = zip(split_rows(rows), compressors, caches, tables, strict=True)
    return tuple(jax.jit(decode_records)(*own, LENS, **keywords) for own in given)


def check_alike(got, want, implementation="ffi"):
    """Equal bits of the CPU's kernels.

    On a GPU sums may be of another order, and in jnp XLA fuses what it likes: of records four bytes
    may differ, and one in 1,000.
    """
    if jax.tree.leaves(got)[0].devices().pop().platform == "cpu" and implementation == "ffi":
        return check_equal(got, want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        if x.dtype == np.uint8:
            assert np.sum(x != y) <= 4 + 1e-3 * np.sum(y != 0xA5)
        else:
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ("ffi", "xla"))
@pytest.mark.parametrize("state_format", ("raw", "prefix"))
@pytest.mark.parametrize("name", KINDS)
def test_a_step_is_its_parts(name, state_format, implementation, device):
    compressor = make_compressor(name)
    cache, tables = make_cache(name, state_format)
    bad = dataclasses.replace(tables, records=tables.records.copy())
    bad.records[0], bad.records[3] = -1, 2**31 - 1
    bad.records[1] = 1431655766  # times 3, in 32 bits: 2
    short = dataclasses.replace(tables, records=tables.records[:, :1])
    step = jax.jit(functools.partial(decode_records, implementation=implementation))
    num_stored = 0
    with jax.default_device(device):
        for seed, lens in enumerate((LENS, LENS + 3, LENS + 6)):
            rows = make_rows(name, seed)
            for q_lens, own in ((None, tables), (Q_LENS, tables), (None, short), (None, bad)):
                got = step(rows, compressor, cache, own, lens, q_lens=q_lens)
                want, count = by_parts(rows, compressor, cache, own, lens, q_lens, implementation)
                check_alike(got, want, implementation)
                num_stored += count
            cache = got
    assert num_stored >= 5


def test_a_step_that_completes_nothing_writes_no_byte(device):
    compressor = make_compressor("main")
    cache, tables = make_cache("main")
    cache = jax.device_put(cache, device)
    lens = np.array([1, 2, 5, 0, 9], np.int32)
    got = jax.jit(decode_records)(make_rows("main", next_n=1), compressor, cache, tables, lens)
    np.testing.assert_array_equal(got.records.pool, 0xA5)
    assert np.any(np.asarray(got.state.kv) != 0)


@pytest.mark.parametrize(
    ("apart", "implementation"),
    [("one array", "ffi"), ("arrays", "ffi"), ("pairs", "ffi"), ("one array", "xla")],
)
def test_several_compressors_are_each_alone(apart, implementation, device):
    with jax.default_device(device):
        rows, *own = make_layer()
        given = rows
        if apart != "one array":
            given = tuple(split_rows(rows))
        if apart == "pairs":
            given = tuple(tuple(jnp.split(x, 2, axis=-1)) for x in given)
        options = {"q_lens": Q_LENS, "implementation": implementation}
        step = jax.jit(decode_records, static_argnames="implementation")
        got = step(given, *own, LENS, **options)
        assert isinstance(got, tuple)
        alone = zip(split_rows(rows), *own, strict=True)
        check_alike(got, tuple(step(*x, LENS, **options) for x in alone))


# On a GPU each batch, and more new rows than four, has kernels of its own.
@pytest.mark.parametrize("next_n", (3, 6))
@pytest.mark.parametrize("batch", (40, 200))
def test_many_requests_of_a_pair_are_those_of_each_alone(batch, next_n, device):
    rng = np.random.default_rng(0)
    compressors = tuple(make_compressor(name) for name in ("main", "indexer"))
    caches, tables = [], []
    for name in ("main", "indexer"):
        head_dim, ratio, records, _ = KINDS[name]
        sizes = {"head_dim": head_dim, "compress_ratio": ratio}
        state = init_state(2 * batch, STATE_PAGE, format="prefix", **sizes)
        caches.append(
            CompressorCache(state, init_records(2 * batch, 2, head_dim=head_dim, **records))
        )
        pages = [rng.permutation(2 * batch).reshape(batch, 2).astype(np.int32) for _ in "12"]
        pages[0][3, 1] = -1
        tables.append(CacheTables(*pages))
    widths = [2 * c.state_dim for c in compressors]
    step = jax.jit(decode_records)
    with jax.default_device(device):
        alone = together = tuple(caches)
        lens = rng.integers(0, 2 * STATE_PAGE - 4, batch, np.int32)
        for _ in range(2):
            lens += rng.integers(1, 3, batch, np.int32)
            rows = rng.standard_normal((batch, next_n, sum(widths)), np.float32)
            rows = jnp.asarray(rows, jnp.bfloat16)
            q_lens = rng.integers(0, next_n + 1, batch, np.int32)
            together = step(rows, compressors, together, tuple(tables), lens, q_lens=q_lens)
            parts = jnp.split(rows, [widths[0]], axis=-1)
            each = zip(parts, compressors, alone, tables, strict=True)
            alone = tuple(step(*own, lens, q_lens=q_lens) for own in each)
            check_alike(together, alone)


CASES = cases.in_formats([*cases.MTP, *cases.IN_REGIMES, *cases.LONG_TABLES])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_is_its_parts(case):
    """Records in f32: every bit of a value; those of some requests go nowhere."""
    x = cases.make_operands(case)
    rng = np.random.default_rng(0)
    positions = case.max_pages * case.page_size
    record_pages = -(-positions // (3 * case.ratio))
    angles = rng.standard_normal((positions, 32))
    compressor = Compressor(
        x.ape,
        rng.standard_normal(case.head_dim, np.float32),
        np.concatenate((np.cos(angles), np.sin(angles)), -1).astype(np.float32),
        *(case.head_dim, case.ratio, case.overlap),
    )
    num_pages = case.batch * record_pages + 2
    records = init_records(num_pages, 3, head_dim=case.head_dim, format="f32")
    records = dataclasses.replace(records, pool=jnp.full(records.pool.shape, 0xA5, jnp.uint8))
    pages = rng.permutation(num_pages)[: case.batch * record_pages].astype(np.int32)
    pages = pages.reshape(case.batch, record_pages)
    pages[::5, -1] = -1
    tables = CacheTables((x.kv_tables, x.score_tables), pages)
    cache = CompressorCache(CompressorState(x.kv, x.score, case.state_format), records)
    operands = x.kv_score, compressor, cache, tables, x.kv_lens, x.q_lens
    with jax.default_device(jax.devices("cpu")[0]):
        got = jax.jit(decode_records)(*operands[:-1], q_lens=x.q_lens)
        want, _ = by_parts(*operands)
    check_equal(got, want)


def test_a_pair_of_kv_and_score_is_one_compressors():
    compressor = make_compressor("hca")
    cache, tables = make_cache("hca")
    rows = make_rows("hca")
    want = decode_records(rows, compressor, cache, tables, LENS)
    kv, score = jnp.split(rows, 2, axis=-1)
    check_equal(decode_records((kv, score), compressor, cache, tables, LENS), want)


@pytest.mark.parametrize("state_format", ("raw", "prefix"))
def test_ten_thousand_steps_with_rewinds_end_in_the_same_bytes(state_format):
    """Drafts of 4 rows, of which any number is rejected, against one row at a time."""
    steps, next_n, page, names = 10_000, 4, 64, ("indexer", "hca, mxfp4")
    rng = np.random.default_rng(0)
    accepted = rng.integers(0, next_n + 1, (steps, 1)).astype(np.int32)
    length = int(accepted.sum())
    pages = (length + next_n) // page + 1
    angles = np.arange(length + next_n)[:, None] * 1e4 ** -np.linspace(0, 1, 32)
    table = np.concatenate((np.cos(angles), np.sin(angles)), -1).astype(np.float32)
    compressors = tuple(
        dataclasses.replace(make_compressor(name), cos_sin_cache=table) for name in names
    )
    caches, tables = [], []
    for c, name in zip(compressors, names, strict=True):
        kind = {"head_dim": c.head_dim, "compress_ratio": c.compress_ratio}
        state = init_state(pages, page, **kind, format=state_format)
        record_pages = -(-pages // c.compress_ratio)
        records = init_records(record_pages, page, head_dim=c.head_dim, **KINDS[name][2])
        caches.append(CompressorCache(state, records))
        tables.append(
            CacheTables(
                rng.permutation(pages)[None].astype(np.int32),
                rng.permutation(record_pages)[None].astype(np.int32),
            )
        )
    width = sum(2 * c.state_dim for c in compressors)
    # Rows by position, each once in 997; and others, by step.
    tokens, others = (rng.standard_normal((997, width), np.float32) for _ in range(2))

    def rows_at(first, count):
        return jnp.take(tokens, (first + jnp.arange(count)) % 997, axis=0)[None]

    def drafted(t, carry):
        lens, caches = carry
        is_token = jnp.arange(next_n)[None, :, None] < accepted[t, 0]
        other = jnp.take(others, (next_n * t + jnp.arange(next_n)) % 997, axis=0)[None]
        rows = jnp.where(is_token, rows_at(lens[0], next_n), other)
        caches = decode_records(rows, compressors, caches, tuple(tables), lens + next_n)
        return lens + accepted[t], caches

    def one_by_one(t, caches):
        lens = jnp.full(1, t + 1, jnp.int32)
        return decode_records(rows_at(t, 1), compressors, caches, tuple(tables), lens)

    with jax.default_device(jax.devices("cpu")[0]):
        accepted = jnp.asarray(accepted)
        run = jax.jit(lambda *x: jax.lax.fori_loop(0, steps, drafted, x), donate_argnums=1)
        lens, got = run(jnp.zeros(1, jnp.int32), jax.tree.map(jnp.array, tuple(caches)))
        run = jax.jit(lambda x: jax.lax.fori_loop(0, length, one_by_one, x), donate_argnums=0)
        want = run(tuple(caches))
    assert int(lens[0]) == length
    for x, y, own, c in zip(got, want, tables, compressors, strict=True):
        # What is past the accepted rows may be of a rejected one.
        check_pages(x.state.kv, y.state.kv, own.state, length // page)
        check_pages(x.state.score, y.state.score, own.state, length // page)
        check_pages(x.records.pool, y.records.pool, own.records, length // c.compress_ratio // page)


def check_pages(got, want, table, count):
    assert count >= 1
    check_equal(np.asarray(got)[table[0, :count]], np.asarray(want)[table[0, :count]])


@pytest.mark.parametrize("layer", (0, 2, jnp.int32(1), 5))
def test_a_layer_is_worked_on_alone(layer):
    compressor = make_compressor("indexer")
    cache, tables = make_cache("indexer")
    layers, _ = make_cache("indexer", layers=3)
    rows = make_rows("indexer")
    step = jax.jit(decode_records, static_argnames="layer" if isinstance(layer, int) else ())
    got = step(rows, compressor, layers, tables, LENS, layer=layer)
    alone = decode_records(rows, compressor, cache, tables, LENS)
    for i in range(3):
        want = alone if i == int(layer) else cache
        check_equal(jax.tree.map(lambda x, i=i: x[i], got), want)


@pytest.mark.parametrize("layer", (2, jnp.int32(1), 5))
def test_it_is_the_layer_of_all_compressors(layer):
    rows, compressors, layers, tables = make_layer(layers=3)
    _, _, caches, _ = make_layer()
    got = decode_records(rows, compressors, layers, tables, LENS, layer=layer)
    alone = each_alone(rows, compressors, caches, tables)
    for i in range(3):
        want = alone if i == int(layer) else caches
        check_equal(jax.tree.map(lambda x, i=i: x[i], got), want)


def one_main(layers=None):
    cache, tables = make_cache("main", layers=layers)
    return make_rows("main"), make_compressor("main"), cache, tables


@pytest.mark.parametrize("layer", (None, 1))
@pytest.mark.parametrize("make", (one_main, make_layer))
def test_the_program_is_one_call_that_updates_in_place(make, layer):
    """No copy of a donated cache, and no slice of an array that holds all compressors' rows."""
    operands = make(layers=None if layer is None else 2)
    program = jax.jit(functools.partial(decode_records, layer=layer), donate_argnums=2)
    compiled = program.lower(*operands, LENS).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(operands[2]))
    assert memory.temp_size_in_bytes == 0
    instructions = re.findall(r"^ +(?:ROOT )?%\S+ = .*? ([\w-]+)\(", compiled.as_text(), re.M)
    assert set(instructions) == {"parameter", "constant", "custom-call"}
    assert instructions.count("custom-call") == 1


def test_a_loop_carries_the_caches_in_place():
    rows, compressors, caches, tables = make_layer()

    def run(caches):
        def step(t, caches):
            lens = jnp.asarray(LENS + 3 * t, jnp.int32)
            return decode_records(rows, compressors, caches, tables, lens)

        return jax.lax.fori_loop(0, 3, step, caches)

    compiled = jax.jit(run, donate_argnums=0).lower(caches).compile()
    leaves = jax.tree.leaves(caches)
    assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in leaves)
    assert compiled.memory_analysis().temp_size_in_bytes < min(x.nbytes for x in leaves)


VMAPPED = ("rows", "compressors", "caches", "tables", "lens")


@pytest.mark.parametrize("unmapped", ("nothing", *VMAPPED))
def test_vmap_is_a_loop(unmapped):
    made = [(*make_layer(seed=10 * i), LENS + i) for i in range(3)]
    operands, axes = [], []
    for name, own in zip(VMAPPED, zip(*made, strict=True), strict=True):
        is_mapped = name != unmapped
        operands.append(jax.tree.map(lambda *x: jnp.stack(x), *own) if is_mapped else own[0])
        axes.append(0 if is_mapped else None)
    step = functools.partial(decode_records, q_lens=Q_LENS)
    got = jax.jit(jax.vmap(step, axes))(*operands)
    for i in range(3):
        own = [
            x if axis is None else jax.tree.map(lambda x, i=i: x[i], x)
            for x, axis in zip(operands, axes, strict=True)
        ]
        check_equal(jax.tree.map(lambda x, i=i: x[i], got), jax.jit(step)(*own))


@pytest.mark.parametrize("half", (0, 1))
def test_vmap_may_map_half_a_pair(half):
    rows, *own = make_layer()
    first, second, third = split_rows(rows)
    pair = jnp.split(second, 2, axis=-1)
    halves = jnp.stack([pair[half] + i for i in range(3)])

    def step(x):
        mine = (x, pair[1]) if half == 0 else (pair[0], x)
        return decode_records((first, mine, third), *own, LENS)

    got = jax.jit(jax.vmap(step))(halves)
    for i in range(3):
        check_equal(jax.tree.map(lambda x, i=i: x[i], got), jax.jit(step)(halves[i]))


EMPTY = {
    "no requests": lambda rows, caches, tables: (
        rows[:0],
        caches,
        jax.tree.map(lambda x: x[:0], tables),
    ),
    "no pages": lambda rows, caches, tables: (
        rows,
        jax.tree.map(lambda x: x[:0], caches),
        tables,
    ),
    "no page in the tables": lambda rows, caches, tables: (
        rows,
        caches,
        jax.tree.map(lambda x: x[:, :0], tables),
    ),
}


@pytest.mark.parametrize("implementation", ("ffi", "xla"))
@pytest.mark.parametrize("empty", EMPTY)
def test_what_is_empty_changes_nothing(empty, implementation):
    rows, compressors, caches, tables = make_layer()
    rows, caches, tables = EMPTY[empty](rows, caches, tables)
    step = jax.jit(functools.partial(decode_records, implementation=implementation))
    check_equal(step(rows, compressors, caches, tables, LENS[: len(rows)]), caches)


@pytest.mark.parametrize("implementation", ("ffi", "xla"))
def test_a_state_without_pages_gives_records_of_zero(implementation):
    rows, compressor, cache, tables = one_main()
    empty = jax.tree.map(lambda x: x[:0], cache.state)
    got = decode_records(
        *(rows, compressor, CompressorCache(empty, cache.records), tables, LENS),
        implementation=implementation,
    )
    slots = tables.records[[0, 3], [0, 63 // RECORD_PAGE]] * RECORD_PAGE + [0, 63 % RECORD_PAGE]
    values = dequantize_records(got.records, slots.astype(np.int32))
    np.testing.assert_array_equal(values, 0)


def test_no_groups_are_served():
    operands = one_main()
    none = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), operands)
    got = jax.jit(jax.vmap(functools.partial(decode_records, kv_lens=LENS)))(*none)
    check_equal(got, none[2])


def step_and_read(rows, compressors, caches, tables, slots):
    caches = decode_records(rows, compressors, caches, tables, LENS)
    return caches, [dequantize_records(cache.records, slots) for cache in caches]


@functools.cache
def groups_of_requests():
    """Operands of 8 groups, and what each gives alone."""
    rows, compressors, caches, tables = zip(
        *(make_layer(seed=10 * i) for i in range(8)), strict=True
    )
    slots = np.arange(-1, 40, dtype=np.int32)
    step = jax.jit(step_and_read)
    want = [
        step(*own, slots) for own in zip(rows, compressors[:1] * 8, caches, tables, strict=True)
    ]
    stack = functools.partial(jax.tree.map, lambda *x: np.stack(list(map(np.asarray, x))))
    return (stack(*rows), stack(*caches), stack(*tables)), (compressors[0], slots), stack(*want)


@pytest.mark.parametrize("placed", (False, True), ids=("unplaced", "placed"))
@pytest.mark.parametrize("mesh_type", MESHES)
@pytest.mark.parametrize("mode", MODES)
def test_modes_and_meshes_change_no_bit(mode, mesh_type, placed):
    (rows, caches, tables), (compressors, slots), want = groups_of_requests()
    mesh = jax.make_mesh(
        (8,),
        ("a",),
        axis_types=(MESHES[mesh_type] or AxisType.Auto,),
        devices=jax.devices("cpu")[:8],
    )
    if placed:
        rows, caches, tables = jax.device_put((rows, caches, tables), NamedSharding(mesh, P("a")))
        compressors, slots = jax.device_put((compressors, slots), NamedSharding(mesh, P()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_mode(mode))
        if MESHES[mesh_type] is not None:
            stack.enter_context(jax.set_mesh(mesh))
        program = jax.jit(jax.vmap(step_and_read, (0, None, 0, 0, None)), donate_argnums=2)
        operands = rows, compressors, caches, tables, slots
        if placed:
            assert not COLLECTIVE.findall(program.lower(*operands).compile().as_text())
        check_equal(program(*operands), want)


def test_each_device_of_a_shard_map_makes_one_call():
    operands, (compressors, slots), want = groups_of_requests()
    mesh = jax.make_mesh((8,), ("a",), devices=jax.devices("cpu")[:8])

    def step(rows, caches, tables):
        own = jax.tree.map(lambda x: x[0], (rows, caches, tables))
        got = step_and_read(own[0], compressors, *own[1:], slots)
        return jax.tree.map(lambda x: x[None], got)

    program = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=P("a"), out_specs=P("a")), donate_argnums=1
    )
    placed = jax.device_put(operands, NamedSharding(mesh, P("a")))
    text = program.lower(*placed).compile().as_text()
    assert not COLLECTIVE.findall(text)
    assert text.count(f'custom_call_target="{decode_records_of(3, False).target}"') == 1
    check_equal(program(*placed), want)


def lowered_call(platform, implementation=None):
    """The lines of the custom call in a program for a platform."""
    rows, *own = make_layer()
    step = functools.partial(decode_records, implementation=implementation)
    text = jax.jit(step).trace(rows, *own, LENS).lower(lowering_platforms=(platform,)).as_text()
    target = decode_records_of(3, False).target
    return [line for line in text.splitlines() if f"custom_call @{target}(" in line]


@pytest.mark.parametrize("platform", ("cpu", "cuda"))
def test_the_call_names_its_attributes_and_aliases(platform):
    (call,) = lowered_call(platform, "ffi")
    first, second, third = re.findall(r"compressor_\d = \{([^}]*)\}", call)
    for attribute in (
        "column = 0 : i64",
        "compress_ratio = 4 : i64",
        "format = 3 : ui8",
        "hadamard = false",
        "interleaved = false",
        "kv_score_dtype = 16 : ui8",
        "overlap = true",
        f"page_size = {RECORD_PAGE} : i64",
        "rms_norm_eps = 9.99999997E-7 : f32",
        "rounding = 1 : ui8",
        "scale_floor = false",
        "scales = 0 : ui8",
        "state_dtype = 11 : ui8",
        "state_format = 0 : ui8",
    ):
        assert attribute in first
    assert "column = 2048 : i64" in second and "state_format = 1 : ui8" in second
    assert "column = 2560 : i64" in third and "compress_ratio = 128 : i64" in third
    for attribute in ("geometry = -1 : i64", "layer = -1 : i64", f"next_n = {NEXT_N} : i64"):
        assert attribute in call
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d+)", call)
    written = [11 * i + k for i in range(3) for k in (3, 4, 10)]
    assert aliases == [(str(n), str(i)) for n, i in enumerate(written)]


@pytest.mark.parametrize(("platform", "implementation"), [("cpu", "xla"), ("tpu", None)])
def test_the_reference_runs_elsewhere_or_if_asked_for(platform, implementation):
    assert not lowered_call(platform, implementation)


@with_or_without_cuda
def test_it_can_be_exported_with_integers_of_numpy():
    rows, (main, *others), caches, tables = make_layer()
    main = dataclasses.replace(main, head_dim=np.int64(512), compress_ratio=np.int32(4))
    operands = (rows, (main, *others), caches, tables, LENS)
    exported = jax.export.export(
        jax.jit(decode_records),
        platforms=("cpu", "cuda"),
        disabled_checks=EXPORT_DISABLED_CHECKS,
    )(*operands)
    target = decode_records_of(3, False).target
    calls = exported.mlir_module().count(f"custom_call @{target}(")
    assert calls == 1 + _ffi.HAS_CUDA  # one for each platform
    got = jax.export.deserialize(exported.serialize()).call(*operands)
    check_equal(got, decode_records(*operands))


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"head_dim": 0}, ValueError),
        ({"head_dim": 1.5}, TypeError),
        ({"compress_ratio": 3}, ValueError),
        ({"overlap": 1}, TypeError),
        ({"head_dim": True}, TypeError),
        ({"rms_norm_eps": -1.0}, ValueError),
        ({"rms_norm_eps": True}, ValueError),
        ({"rms_norm_eps": 1e39}, ValueError),
        ({"rope_layout": "neox"}, ValueError),
        ({"hadamard": 1}, TypeError),
        ({"rounding": "twice"}, ValueError),
    ],
    ids=str,
)
def test_a_wrong_static_field_is_named_at_once(changed, error):
    with pytest.raises(error, match=f"^{next(iter(changed))}"):
        dataclasses.replace(make_compressor("main"), **changed)


def wrong_calls():
    compressor = make_compressor("main")
    cache, tables = make_cache("main")
    indexer, _ = make_cache("indexer")
    small = dataclasses.replace(tables, records=tables.records[:2])
    return {
        "compressor: expected a Compressor": {"compressor": None},
        "cache: expected a CompressorCache": {"cache": cache.state},
        "records: expected a RecordCache": {"cache": CompressorCache(cache.state, None)},
        "cache.records: expected head_dim 512": {
            "cache": CompressorCache(cache.state, indexer.records)
        },
        "cache.state: expected S = 1024": {"cache": CompressorCache(indexer.state, cache.records)},
        "tables: expected a CacheTables": {"tables": tables.state},
        "tables.records: expected shape": {"tables": small},
        "tables.state: expected shape": {
            "tables": dataclasses.replace(tables, state=tables.state[:2])
        },
        "tables.records: expected int32": {
            "tables": dataclasses.replace(tables, records=tables.records.astype(np.uint8))
        },
        "kv_score: expected 2 arrays": {
            "kv_score": (make_rows("main"),),
            "compressor": (compressor,) * 2,
            "cache": (cache,) * 2,
            "tables": (tables,) * 2,
        },
        "kv_score: expected shape": {
            "compressor": (compressor,) * 2,
            "cache": (cache,) * 2,
            "tables": (tables,) * 2,
        },
        "cache: expected a tuple of 1": {"compressor": (compressor,)},
        "compressor: expected a Compressor, or a tuple": {"compressor": ()},
        r"compressor\[1\]: cache.state: expected S = 1024": {
            "kv_score": (make_rows("main"),) * 2,
            "compressor": (compressor,) * 2,
            "cache": (cache, CompressorCache(indexer.state, cache.records)),
            "tables": (tables,) * 2,
        },
        r"compressor\[1\]: kv_score: expected shape \[5, 3, columns\]": {
            "kv_score": (make_rows("main"), make_rows("main", next_n=2)),
            "compressor": (compressor,) * 2,
            "cache": (cache,) * 2,
            "tables": (tables,) * 2,
        },
        r"compressor\[1\]: cache: expected 2 layers": {
            "kv_score": (make_rows("main"),) * 2,
            "compressor": (compressor,) * 2,
            "cache": tuple(make_cache("main", layers=n)[0] for n in (2, 3)),
            "tables": (tables,) * 2,
            "layer": 1,
        },
        "kv_lens: expected shape": {"kv_lens": LENS[:2]},
        "q_lens: expected shape": {"q_lens": LENS[:2]},
        "implementation: expected one of": {"implementation": "cuda"},
        "cache.records: expected 2 layers": {
            "cache": CompressorCache(
                make_cache("main", layers=2)[0].state, make_cache("main", layers=3)[0].records
            ),
            "layer": 1,
        },
        "layer: ": {"layer": 0},
    }


@pytest.mark.parametrize("text", wrong_calls())
def test_a_wrong_call_is_named(text):
    cache, tables = make_cache("main")
    arguments = {
        "kv_score": make_rows("main"),
        "compressor": make_compressor("main"),
        "cache": cache,
        "tables": tables,
        "kv_lens": LENS,
    }
    with pytest.raises((ValueError, TypeError), match=f"^{text}"):
        decode_records(**arguments | wrong_calls()[text])


def test_more_records_than_slots_can_number_are_refused():
    rows, compressor, cache, tables = one_main()
    pool = jax.ShapeDtypeStruct((2**31 // RECORD_PAGE + 1, cache.records.pool.shape[-1]), "uint8")
    huge = CompressorCache(cache.state, dataclasses.replace(cache.records, pool=pool))
    with pytest.raises(ValueError, match=r"^cache.records: expected fewer than 2\^31 records"):
        jax.eval_shape(decode_records, rows, compressor, huge, tables, LENS)
