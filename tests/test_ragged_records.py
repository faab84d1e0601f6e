"""Ragged batches that end in records are their parts; and the transforms of both operations."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import COLLECTIVE, with_or_without_cuda
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_compressor import (
    BATCH,
    KINDS,
    LAYER,
    check_alike,
    check_equal,
    make_cache,
    make_compressor,
    make_layer,
    split_rows,
    store_values,
)
from test_matrix import MESHES, MODES, in_mode

from jax_dsv4 import (
    EXPORT_DISABLED_CHECKS,
    CompressorCache,
    _ffi,
    decode_records,
    dequantize_records,
    live,
    ragged_kv_compress,
    ragged_records,
    ragged_windows,
)
from jax_dsv4.compressor import ragged_records_of
from jax_dsv4.ragged import RAGGED

T = 60
LENS = np.array([9, 140, 0, 256, 407], np.int32)
CU = np.array([1, 10, 40, 43, 46, 55], np.int32)  # padding in front and behind
SEQS = np.int32(BATCH)
RULES = ("all", live(max_rewind=2), live(max_rewind=0, resume_every=8))
IMPLEMENTATIONS = ("ffi", "xla")
on_each_device = pytest.mark.usefixtures("on_device")
of_rules = pytest.mark.parametrize("rule", RULES, ids=("all", "live", "live, resume"))


def make_rows(name, seed=0):
    width = 2 * make_compressor(name).state_dim
    rows = np.random.default_rng(seed).standard_normal((T, width), np.float32)
    rows[[0, *range(40, 43), *range(55, T)]] = np.nan
    return jnp.asarray(rows, jnp.bfloat16)


def ragged_layer(layers=None, seed=0):
    """As ``make_layer``, with the rows of a ragged batch."""
    _, *own = make_layer(layers, seed)
    rows = [make_rows(name, seed + i) for i, name in enumerate(LAYER)]
    return jnp.concatenate(rows, axis=-1), *own


def quickly(call, **options):
    """Jitted without LLVM's optimizations, which take most of a reference's time on a CPU."""
    options_of_compiler = {"xla_backend_optimization_level": 0}
    return jax.jit(functools.partial(call, **options), compiler_options=options_of_compiler)


def check_reference(got, want):
    """Records may be a step of their format apart, and scales by amax's last bits."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        if x.dtype == np.uint8:
            assert np.sum(x != y) <= 2 + 1e-2 * np.sum(y != 0xA5)
        else:
            tolerance = 1e-5 if x.dtype == np.float32 else 2**-7
            x, y = x.astype(np.float32), y.astype(np.float32)
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=1e-5)


def by_parts(rows, c, cache, tables, lens, cu, store_rows, implementation):
    """The values of ``ragged_kv_compress``, each stored in the slot that a loop finds for it."""
    values, state = ragged_kv_compress(
        *(rows, c.ape, cache.state, tables.state, lens, cu),
        compress_ratio=c.compress_ratio,
        store_rows=store_rows,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    windows = ragged_windows(cu, lens, num_rows=len(rows), compress_ratio=c.compress_ratio)
    slots, positions = np.full((2, len(values)), -1, np.int32)
    records = cache.records
    for i, (b, w) in enumerate(zip(*map(np.asarray, windows), strict=True)):
        logical, row = divmod(w, records.page_size)
        if b >= 0 and logical < tables.records.shape[1]:
            positions[i], page = w * c.compress_ratio, tables.records[b, logical]
            if 0 <= page < records.pool.shape[0]:
                slots[i] = page * records.page_size + row
    records = store_values(values, slots, positions, records, c, implementation)
    return CompressorCache(state, records), np.sum(slots >= 0)


@on_each_device
@pytest.mark.parametrize("state_format", ("raw", "prefix"))
@pytest.mark.parametrize("name", KINDS)
def test_a_call_is_its_parts(name, state_format):
    """With pages of records that are bad, tables that end, and a position past the rotations."""
    compressor = make_compressor(name)
    cache, tables = make_cache(name, state_format)
    bad = dataclasses.replace(tables, records=tables.records.copy())
    bad.records[0], bad.records[3] = -1, 2**31 - 1
    short = dataclasses.replace(tables, records=tables.records[:, :1])
    rows, stored = make_rows(name), 0
    for own, rule in [*((tables, rule) for rule in RULES), (bad, "all"), (short, "all")]:
        call = jax.jit(functools.partial(ragged_records, store_rows=rule, implementation="ffi"))
        got = call(rows, compressor, cache, own, LENS, CU)
        want, count = by_parts(rows, compressor, cache, own, LENS, CU, rule, "ffi")
        check_alike(got, want)
        stored += count
    assert stored >= 5


@on_each_device
@pytest.mark.parametrize("apart", ("one array", "arrays", "pairs"))
def test_several_compressors_are_each_alone(apart):
    rows, *own = ragged_layer()
    given = rows
    if apart != "one array":
        given = tuple(split_rows(rows))
    if apart == "pairs":
        given = tuple(tuple(jnp.split(x, 2, axis=-1)) for x in given)
    call = functools.partial(
        ragged_records, num_seqs=SEQS, store_rows=RULES[1], implementation="ffi"
    )
    got = jax.jit(call)(given, *own, LENS, CU)
    assert isinstance(got, tuple)
    alone = zip(split_rows(rows), *own, strict=True)
    check_alike(got, tuple(jax.jit(call)(*x, LENS, CU) for x in alone))


@on_each_device
@of_rules
def test_the_reference_agrees_with_the_kernel(rule):
    operands = *ragged_layer(), LENS, CU
    options = {"num_seqs": SEQS - 1, "store_rows": rule}
    want = jax.jit(functools.partial(ragged_records, **options))(*operands)
    check_reference(quickly(ragged_records, implementation="xla", **options)(*operands), want)


@on_each_device
def test_decode_steps_are_those_of_decode_records():
    rows, *own = make_layer()
    next_n, lens = rows.shape[1], np.array([4, 130, 0, 256, 391], np.int32)
    cu = np.arange(BATCH + 1, dtype=np.int32) * next_n
    want = jax.jit(decode_records)(rows, *own, lens)
    check_reference(
        jax.jit(ragged_records)(rows.reshape(len(CU[1:]) * next_n, -1), *own, lens, cu), want
    )


@on_each_device
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_call_that_completes_nothing_writes_no_record(implementation):
    cache, tables = make_cache("main")
    lens, cu = np.array([3, 0, 0, 0, 10], np.int32), np.array([0, 3, 5, 5, 5, 7], np.int32)
    operands = make_rows("main")[1:], make_compressor("main"), cache, tables
    got = ragged_records(*operands, lens, cu, implementation=implementation)
    np.testing.assert_array_equal(got.records.pool, 0xA5)
    assert np.any(np.asarray(got.state.kv) != 0)


@on_each_device
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_window_of_which_nothing_is_left_gives_a_record_of_zeros(implementation):
    compressor, (cache, tables) = make_compressor("indexer"), make_cache("indexer")
    compressor = dataclasses.replace(compressor, rms_norm_eps=0)
    nowhere = dataclasses.replace(tables, state=np.full_like(tables.state, -1))
    operands = make_rows("indexer"), compressor, cache
    got = ragged_records(*operands, nowhere, LENS, CU, implementation=implementation)
    slot = tables.records[:1, 0] * cache.records.page_size
    np.testing.assert_array_equal(dequantize_records(got.records, slot.astype(np.int32)), 0)
    assert np.any(np.asarray(got.records.pool) != np.asarray(cache.records.pool))
    rule = live(max_rewind=0)
    got = ragged_records(
        *operands, nowhere, LENS, CU, store_rows=rule, implementation=implementation
    )
    assert np.any(np.asarray(dequantize_records(got.records, slot.astype(np.int32))) != 0)


@on_each_device
@pytest.mark.parametrize("layer", (0, 2, jnp.int32(1), 5))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_is_worked_on_alone(layer, implementation):
    compressor = make_compressor("indexer")
    (cache, tables), (layers, _) = make_cache("indexer"), make_cache("indexer", layers=3)
    rows = make_rows("indexer")
    call = functools.partial(ragged_records, implementation=implementation)
    got = call(rows, compressor, layers, tables, LENS, CU, layer=layer)
    alone = call(rows, compressor, cache, tables, LENS, CU)
    for i in range(3):
        want = alone if i == int(layer) else jax.tree.map(lambda x, i=i: x[i], layers)
        check_equal(jax.tree.map(lambda x, i=i: x[i], got), want)


@pytest.mark.parametrize(
    ("text", "changed", "error"),
    [
        ("kv_score: expected", {"kv_score": np.zeros((T, 3, 2048), np.float32)}, ValueError),
        ("kv_score: expected", {"kv_score": np.zeros((T, 2047), np.float32)}, ValueError),
        ("cu_q_lens: expected", {"cu_q_lens": CU[1:]}, ValueError),
        ("kv_lens: expected", {"kv_lens": LENS.astype(np.int64)}, TypeError),
        ("num_seqs: expected", {"num_seqs": np.zeros(1, np.int32)}, ValueError),
        ("store_rows: expected", {"store_rows": 3}, ValueError),
        ("tables.state: expected", {"kv_lens": LENS[1:], "cu_q_lens": CU[1:]}, ValueError),
        ("cache: expected", {"cache": None}, TypeError),
        ("implementation: expected", {"implementation": "cuda"}, ValueError),
    ],
)
def test_a_wrong_argument_is_named(text, changed, error):
    cache, tables = make_cache("main")
    good = {
        "kv_score": make_rows("main"),
        "compressor": make_compressor("main"),
        "cache": cache,
        "tables": tables,
        "kv_lens": LENS,
        "cu_q_lens": CU,
    }
    with pytest.raises(error, match=f"^{text}"):
        ragged_records(**good | changed)


def test_other_rows_than_the_first_compressors_are_named():
    rows, *own = ragged_layer()
    first, second, third = split_rows(rows)
    with pytest.raises(ValueError, match=rf"^compressor\[1\]: kv_score: expected shape \[{T}, col"):
        ragged_records((first, second[1:], third), *own, LENS, CU)


# ------------------------------------------------------------------------- transforms of both


def values_call(rows, compressors, caches, tables, lens, cu, seqs, **options):
    """``ragged_kv_compress`` of a layer's indexer, in the form of ``ragged_records``."""
    c, cache, own = compressors[1], caches[1], tables[1]
    kv_comp, state = ragged_kv_compress(
        *(split_rows(rows)[1], c.ape, cache.state, own.state, lens, cu),
        compress_ratio=c.compress_ratio,
        num_seqs=seqs,
        store_rows=RULES[2],
        **options,
    )
    return CompressorCache(state, cache.records), kv_comp


def records_call(rows, compressors, caches, tables, lens, cu, seqs, **options):
    return ragged_records(
        *(rows, compressors, caches, tables, lens, cu),
        num_seqs=seqs,
        store_rows=RULES[1],
        **options,
    )


CALLS = {
    RAGGED: values_call,
    ragged_records_of(3, False): records_call,
}
of_both = pytest.mark.parametrize("operation", CALLS, ids=str)
NAMES = ("rows", "compressors", "caches", "tables", "lens", "cu", "seqs")


@on_each_device
@pytest.mark.parametrize("mapped", (*NAMES, "everything", "all but the caches", "lens, then cu"))
@of_both
def test_vmap_is_a_loop_and_one_call(operation, mapped):
    first, then = mapped, None
    if mapped == "lens, then cu":
        first, then = "lens", "cu"
    made = [(*ragged_layer(seed=10 * i), LENS + i, CU - i, SEQS - i) for i in range(2)]
    operands, axes, inner = [], [], []
    for name, own in zip(NAMES, zip(*made, strict=True), strict=True):
        everything = mapped == "everything" or (mapped[:3] == "all" and name != "caches")
        is_mapped = name in (first, then) or everything
        operands.append(jax.tree.map(lambda *x: jnp.stack(x), *own) if is_mapped else own[0])
        axes.append(0 if name == first or everything else None)
        inner.append(0 if name == then else None)
    step = jax.vmap(CALLS[operation], inner) if then else CALLS[operation]
    program = jax.jit(jax.vmap(step, axes))
    got = program(*operands)
    text = program.lower(*operands).as_text()
    assert len(re.findall(rf"custom_call @{operation.target}\b", text)) == 1
    for i in range(2):
        own = [
            x if axis is None else jax.tree.map(lambda x, i=i: x[i], x)
            for x, axis in zip(operands, axes, strict=True)
        ]
        ours = jax.tree.map(lambda x, i=i: x[i], got)
        if then is None:
            check_equal(ours, jax.jit(step)(*own))
            continue
        for j in range(2):
            own[NAMES.index(then)] = operands[NAMES.index(then)][j]
            want = jax.jit(CALLS[operation])(*own)
            check_equal(jax.tree.map(lambda x, j=j: x[j], ours), want)


@of_both
def test_vmap_of_the_reference_is_a_loop(operation):
    made = [(*ragged_layer(seed=10 * i), LENS + i, CU - i, SEQS - i) for i in range(2)]
    operands = [jax.tree.map(lambda *x: jnp.stack(x), *own) for own in zip(*made, strict=True)]
    call = functools.partial(CALLS[operation], implementation="xla")
    got, alone = quickly(jax.vmap(call))(*operands), quickly(call)
    for i, own in enumerate(made):
        check_reference(jax.tree.map(lambda x, i=i: x[i], got), alone(*own))


@on_each_device
@of_both
def test_a_loop_updates_donated_caches_in_place(operation):
    rows, compressors, caches, tables = ragged_layer()

    def run(caches):
        def step(t, caches):
            lens = jnp.asarray(LENS + 3 * t, jnp.int32)
            got = CALLS[operation](rows, compressors, caches, tables, lens, CU, SEQS)
            return got if operation is not RAGGED else (caches[0], got[0], caches[2])

        return jax.lax.fori_loop(0, 3, step, caches)

    compiled = jax.jit(run, donate_argnums=0).lower(caches).compile()
    leaves, memory = jax.tree.leaves(caches), compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in leaves)
    # One compressor's rows are cut out of those of all.
    own = caches[1].state if operation is RAGGED else caches
    assert memory.temp_size_in_bytes < min(x.nbytes for x in jax.tree.leaves(own))
    assert not COLLECTIVE.findall(compiled.as_text())


@functools.cache
def groups_of_requests(operation):
    """Operands of 8 groups, and what each gives alone."""
    made = [(*ragged_layer(seed=10 * i), LENS + i, CU - i % 2, SEQS) for i in range(8)]
    # In a mode that finds NaN there is none in the operands.
    made = [(jnp.nan_to_num(rows), *others) for rows, *others in made]
    call = jax.jit(CALLS[operation])
    compressors = made[0][1]
    want = [call(rows, compressors, *others) for rows, _, *others in made]
    stack = functools.partial(jax.tree.map, lambda *x: np.stack(list(map(np.asarray, x))))
    rows, _, *others = (stack(*own) for own in zip(*made, strict=True))
    return (rows, *others), compressors, stack(*want)


@pytest.mark.parametrize("placed", (False, True), ids=("unplaced", "placed"))
@pytest.mark.parametrize("mesh_type", MESHES)
@pytest.mark.parametrize("mode", MODES)
@of_both
def test_modes_and_meshes_change_no_bit(operation, mode, mesh_type, placed):
    grouped, compressors, want = groups_of_requests(operation)
    mesh = jax.make_mesh(
        (8,),
        ("a",),
        axis_types=(MESHES[mesh_type] or AxisType.Auto,),
        devices=jax.devices("cpu")[:8],
    )
    if placed:
        grouped = jax.device_put(grouped, NamedSharding(mesh, P("a")))
        compressors = jax.device_put(compressors, NamedSharding(mesh, P()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_mode(mode))
        if MESHES[mesh_type] is not None:
            stack.enter_context(jax.set_mesh(mesh))
        call = jax.vmap(CALLS[operation], (0, None, *[0] * 5))
        program = jax.jit(call, donate_argnums=2)
        operands = grouped[0], compressors, *grouped[1:]
        if placed:
            assert not COLLECTIVE.findall(program.lower(*operands).compile().as_text())
        check_equal(program(*operands), want)


@functools.cache
def reference_results(operation):
    rows, *others = *ragged_layer(), LENS, CU, SEQS
    operands = jnp.nan_to_num(rows), *others
    return operands, quickly(CALLS[operation], implementation="xla")(*operands)


@pytest.mark.parametrize("mode", MODES)
@of_both
def test_modes_change_no_bit_of_the_reference(operation, mode):
    operands, want = reference_results(operation)
    with in_mode(mode):
        check_equal(quickly(CALLS[operation], implementation="xla")(*operands), want)


@of_both
def test_each_device_of_a_shard_map_makes_one_call(operation):
    operands, compressors, want = groups_of_requests(operation)
    mesh = jax.make_mesh((8,), ("a",), devices=jax.devices("cpu")[:8])

    def step(rows, *others):
        rows, *others = jax.tree.map(lambda x: x[0], (rows, *others))
        got = CALLS[operation](rows, compressors, *others)
        return jax.tree.map(lambda x: x[None], got)

    program = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("a"), out_specs=P("a")))
    placed = jax.device_put(operands, NamedSharding(mesh, P("a")))
    text = program.lower(*placed).compile().as_text()
    assert not COLLECTIVE.findall(text)
    assert text.count(f'custom_call_target="{operation.target}"') == 1
    check_equal(program(*placed), want)


@pytest.mark.parametrize("platform", ("cpu", "cuda"))
@of_both
def test_the_call_names_its_attributes_and_aliases(operation, platform):
    operands = *ragged_layer(), LENS, CU, SEQS
    call = functools.partial(CALLS[operation], implementation="ffi")
    text = jax.jit(call).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
    (line,) = [x for x in text.splitlines() if f"custom_call @{operation.target}(" in x]
    for attribute in ("geometry = -1 : i64", "layer = -1 : i64"):
        assert attribute in line
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d+)", line)
    if operation is RAGGED:
        for attribute in (
            *("max_rewind = 0 : i64", "resume_every = 8 : i64", "compress_ratio = 4 : i64"),
            *("overlap = true", "kv_score_dtype = 16 : ui8", "out_dtype = 16 : ui8"),
            *("state_format = 1 : ui8", "state_dtype = 11 : ui8"),
        ):
            assert attribute in line
        assert aliases == [("1", "3"), ("2", "4")]
        return
    for attribute in ("max_rewind = 2 : i64", "resume_every = 0 : i64"):
        assert attribute in line
    parts = re.findall(r"compressor_\d = \{([^}]*)\}", line)
    assert [int(re.search(r"column = (\d+)", part)[1]) for part in parts] == [0, 2048, 2560]
    assert not any(re.search("max_rewind|next_n|layer|out_dtype", part) for part in parts)
    written = [11 * i + k for i in range(3) for k in (3, 4, 10)]
    assert aliases == [(str(n), str(i)) for n, i in enumerate(written)]


@pytest.mark.parametrize("platform", ("tpu", "rocm"))
@of_both
def test_platforms_without_a_kernel_get_the_reference(operation, platform):
    operands = *ragged_layer(), LENS, CU, SEQS

    def lower(**options):
        traced = jax.jit(functools.partial(CALLS[operation], **options)).trace(*operands)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    text = lower()
    assert operation.target not in text and "stablehlo.scatter" in text
    with pytest.raises(NotImplementedError, match=platform):
        lower(implementation="ffi")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ending", ("values", "records"))
def test_an_exported_call_serves_any_number_of_rows_and_requests(ending, implementation):
    compressor, (cache, tables) = make_compressor("main"), make_cache("main", "prefix")
    rows, batch = jax.export.symbolic_shape("rows, batch")

    def call(kv_score, cache, tables, lens, cu):
        windows = ragged_windows(cu, lens, num_rows=kv_score.shape[0], compress_ratio=4)
        options = {"implementation": implementation}
        if ending == "records":
            return windows, ragged_records(kv_score, compressor, cache, tables, lens, cu, **options)
        values = ragged_kv_compress(
            *(kv_score, compressor.ape, cache.state, tables.state, lens, cu),
            compress_ratio=4,
            **options,
        )
        return windows, values

    i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    exported = jax.export.export(
        jax.jit(call),
        platforms=("cpu", "cuda"),
        disabled_checks=EXPORT_DISABLED_CHECKS,
    )(
        jax.ShapeDtypeStruct((rows, 2 * compressor.state_dim), jnp.bfloat16),
        cache,
        jax.tree.map(lambda table: i32((batch, table.shape[1])), tables),
        *(i32((batch,)), i32((batch + 1,))),
    )
    loaded = jax.export.deserialize(exported.serialize())
    operands = make_rows("main"), cache, tables, LENS, CU
    for first in (0, 3):
        own = *operands[:2], *jax.tree.map(lambda x, first=first: x[first:], operands[2:])
        got, want = loaded.call(*own), jax.jit(call)(*own)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            if x.dtype == jnp.uint8:  # of a record
                assert np.mean(np.asarray(x) != y) < 1e-3
                continue
            x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
            np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-5)


@of_both
@with_or_without_cuda
def test_an_exported_call_is_the_call(operation):
    operands = *ragged_layer(), LENS, CU, SEQS
    program = jax.jit(CALLS[operation])
    with pytest.raises(ValueError, match=operation.target):
        jax.export.export(program, platforms=("cpu", "cuda"))(*operands)
    exported = jax.export.export(
        program, platforms=("cpu", "cuda"), disabled_checks=EXPORT_DISABLED_CHECKS
    )(*operands)
    calls = exported.mlir_module().count(f"custom_call @{operation.target}(")
    assert calls == 1 + _ffi.HAS_CUDA  # one for each platform
    loaded = jax.export.deserialize(exported.serialize())
    check_equal(loaded.call(*operands), program(*operands))


@of_both
def test_derivatives_raise_a_clear_error(operation):
    rows, *others = *ragged_layer(), LENS, CU, SEQS

    def loss(rows):
        leaves = jax.tree.leaves(CALLS[operation](rows, *others))
        return sum(jnp.sum(x) for x in leaves if x.dtype == jnp.float32)

    with pytest.raises(NotImplementedError, match=f"{operation.name} has no derivative"):
        jax.grad(loss)(rows.astype(jnp.float32))


def test_eval_shape_follows_the_operands():
    rows, *others = *ragged_layer(), LENS, CU, SEQS
    got = jax.eval_shape(records_call, rows, *others)
    want = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), others[1])
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(got)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(want)
    ]
