"""Decode that ends in records: the same as its parts, for one compressor and for several."""

import contextlib
import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import COLLECTIVE
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_matrix import MESHES, MODES, in_mode

from jax_dsv4 import (
    EXPORT_DISABLED_CHECKS,
    CacheTables,
    Compressor,
    CompressorCache,
    decode_records,
    dequantize_records,
    init_records,
    init_state,
    paged_kv_compress,
    store_records,
)

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
    slots, positions, rows = [], [], []
    for b in range(BATCH):
        n = kv_score.shape[1] if q_lens is None else min(max(q_lens[b], 0), kv_score.shape[1])
        if n == 0 or kv_lens[b] <= 0:
            continue
        first = max(kv_lens[b] - n, 0) // c.compress_ratio
        for m, window in enumerate(range(first, kv_lens[b] // c.compress_ratio)):
            logical, row = divmod(window, records.page_size)
            page = tables.records[b, logical] if logical < tables.records.shape[1] else -1
            if 0 <= page < records.pool.shape[0]:
                slots.append(page * records.page_size + row)
                positions.append(window * c.compress_ratio)
                rows.append(np.asarray(values[b, m]))
    if not slots:
        return CompressorCache(state, records), 0
    records = store_records(
        np.stack(rows),
        np.array(slots, np.int32),
        np.array(positions, np.int32),
        records,
        norm_weight=c.norm_weight,
        cos_sin_cache=c.cos_sin_cache,
        rms_norm_eps=c.rms_norm_eps,
        rope_layout=c.rope_layout,
        hadamard=c.hadamard,
        rounding=c.rounding,
        implementation=implementation,
    )
    return CompressorCache(state, records), len(slots)


def check_equal(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


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
                check_equal(got, want)
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


@pytest.mark.parametrize("apart", (False, True))
def test_several_compressors_are_each_alone(apart, device):
    names = ("main", "indexer")
    compressors = tuple(make_compressor(name, i) for i, name in enumerate(names))
    caches, tables = zip(*(make_cache(name, seed=i) for i, name in enumerate(names)), strict=True)
    rows = tuple(make_rows(name, i) for i, name in enumerate(names))
    together = rows if apart else jnp.concatenate(rows, axis=-1)
    with jax.default_device(device):
        got = jax.jit(decode_records)(together, compressors, caches, tables, LENS, q_lens=Q_LENS)
        assert isinstance(got, tuple)
        for i in range(2):
            own = (rows[i], compressors[i], caches[i], tables[i])
            check_equal(got[i], jax.jit(decode_records)(*own, LENS, q_lens=Q_LENS))


def test_a_pair_of_kv_and_score_is_one_compressors():
    compressor = make_compressor("hca")
    cache, tables = make_cache("hca")
    rows = make_rows("hca")
    want = decode_records(rows, compressor, cache, tables, LENS)
    kv, score = jnp.split(rows, 2, axis=-1)
    check_equal(decode_records((kv, score), compressor, cache, tables, LENS), want)


@pytest.mark.parametrize("state_format", ("raw", "prefix"))
def test_a_decode_with_rewinds_ends_in_the_same_records(state_format):
    """Drafts of 3 rows, of which any number is rejected, against one row at a time."""
    name = "main"
    compressor = make_compressor(name)
    cache, tables = make_cache(name, state_format)
    rng = np.random.default_rng(0)
    width = make_rows(name).shape[-1]
    tokens = rng.standard_normal((BATCH, 120, width), np.float32).astype(jnp.bfloat16)
    step = jax.jit(decode_records, donate_argnums=2)
    one_by_one = cache
    for t in range(100):
        lens = np.full(BATCH, t + 1, np.int32)
        one_by_one = jax.jit(decode_records)(
            tokens[:, t : t + 1], compressor, one_by_one, tables, lens
        )
    drafted = jax.tree.map(jnp.array, cache)
    lens = np.zeros(BATCH, np.int32)
    while lens.min() < 100:
        rows = np.stack([tokens[b, lens[b] : lens[b] + 3] for b in range(BATCH)])
        accepted = np.minimum(rng.integers(0, 4, BATCH), np.maximum(100 - lens, 0))
        for b in range(BATCH):  # what is rejected was another token
            rows[b, accepted[b] :] = rng.standard_normal((3 - accepted[b], width))
        drafted = step(rows, compressor, drafted, tables, (lens + 3).astype(np.int32))
        lens = (lens + accepted).astype(np.int32)
    page = np.asarray(tables.records)[:, : 25 // RECORD_PAGE]
    got, want = (np.asarray(x.records.pool)[page] for x in (drafted, one_by_one))
    np.testing.assert_array_equal(got, want)
    assert not np.all(want == 0xA5)


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


def test_a_donated_cache_is_updated_in_place():
    compressor = make_compressor("main")
    cache, tables = make_cache("main")
    program = jax.jit(decode_records, donate_argnums=2)
    compiled = program.lower(make_rows("main"), compressor, cache, tables, LENS).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    assert not [
        line for line in compiled.as_text().splitlines() if "copy(" in line and "u8" in line
    ]


def test_vmap_is_a_loop():
    compressor = make_compressor("indexer")
    caches, tables = zip(*(make_cache("indexer", seed=i) for i in range(3)), strict=True)
    stacked, all_tables = (jax.tree.map(lambda *x: jnp.stack(x), *y) for y in (caches, tables))
    rows = jnp.stack([make_rows("indexer", i) for i in range(3)])
    step = functools.partial(decode_records, kv_lens=LENS, q_lens=Q_LENS)
    got = jax.jit(jax.vmap(lambda rows, cache, tables: step(rows, compressor, cache, tables)))(
        rows, stacked, all_tables
    )
    for i in range(3):
        want = step(rows[i], compressor, caches[i], tables[i])
        check_equal(jax.tree.map(lambda x, i=i: x[i], got), want)


def step_and_read(rows, compressor, cache, tables, slots):
    cache = decode_records(rows, compressor, cache, tables, LENS)
    return cache, dequantize_records(cache.records, slots)


@functools.cache
def groups_of_requests():
    """Operands of 8 groups, and what each gives alone."""
    compressor = make_compressor("indexer")
    caches, tables = zip(*(make_cache("indexer", seed=i) for i in range(8)), strict=True)
    rows = [np.asarray(make_rows("indexer", i)) for i in range(8)]
    slots = np.arange(-1, 40, dtype=np.int32)
    want = [
        step_and_read(*own, slots)
        for own in zip(rows, [compressor] * 8, caches, tables, strict=True)
    ]
    stack = functools.partial(jax.tree.map, lambda *x: np.stack(list(map(np.asarray, x))))
    return (stack(*rows), stack(*caches), stack(*tables)), (compressor, slots), stack(*want)


@pytest.mark.parametrize("placed", (False, True), ids=("unplaced", "placed"))
@pytest.mark.parametrize("mesh_type", MESHES)
@pytest.mark.parametrize("mode", MODES)
def test_modes_and_meshes_change_no_bit(mode, mesh_type, placed):
    (rows, caches, tables), (compressor, slots), want = groups_of_requests()
    mesh = jax.make_mesh(
        (8,),
        ("a",),
        axis_types=(MESHES[mesh_type] or AxisType.Auto,),
        devices=jax.devices("cpu")[:8],
    )
    if placed:
        rows, caches, tables = jax.device_put((rows, caches, tables), NamedSharding(mesh, P("a")))
        compressor, slots = jax.device_put((compressor, slots), NamedSharding(mesh, P()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_mode(mode))
        if MESHES[mesh_type] is not None:
            stack.enter_context(jax.set_mesh(mesh))
        program = jax.jit(jax.vmap(step_and_read, (0, None, 0, 0, None)), donate_argnums=2)
        operands = rows, compressor, caches, tables, slots
        if placed:
            assert not COLLECTIVE.findall(program.lower(*operands).compile().as_text())
        check_equal(program(*operands), want)


def test_it_can_be_exported_with_integers_of_numpy():
    compressor = dataclasses.replace(
        make_compressor("indexer"), head_dim=np.int64(128), compress_ratio=np.int32(4)
    )
    cache, tables = make_cache("indexer")
    operands = (make_rows("indexer"), compressor, cache, tables, LENS)
    exported = jax.export.export(
        jax.jit(decode_records),
        platforms=("cpu", "cuda"),
        disabled_checks=EXPORT_DISABLED_CHECKS,
    )(*operands)
    got = jax.export.deserialize(exported.serialize()).call(*operands)
    check_equal(got, decode_records(*operands))


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"head_dim": 0}, ValueError),
        ({"head_dim": 1.5}, TypeError),
        ({"compress_ratio": 3}, ValueError),
        ({"overlap": 1}, TypeError),
        ({"rms_norm_eps": -1.0}, ValueError),
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
