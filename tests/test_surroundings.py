"""What surrounds a call: memories, checkpoints, foreign arrays, references, reloads, installs."""

import functools
import pathlib
import pickle
import subprocess
import sys
import types

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPERAND_NAMES
from checks import STATE, Results, check_results, run, step_of
from jax.sharding import AxisType, SingleDeviceSharding

import jax_dsv4
from jax_dsv4 import (
    CompressorState,
    PagePool,
    _ffi,
    completed_windows,
    init_state,
    live_pages,
    num_compressed,
    paged_kv_compress,
    pages_needed,
    raw_to_prefix,
    slot_tables,
)
from jax_dsv4 import decode as decode_module

CASE = cases.MAPPED
ROOT = pathlib.Path(__file__).parent.parent
R4 = {"compress_ratio": 4}


def call(**changed):
    """A small call, with some arguments changed."""
    arguments = {
        "kv_score": np.ones((2, 3, 512), np.float32),
        "ape": np.ones((4, 256), np.float32),
        "state": init_state(8, 4, head_dim=128, compress_ratio=4),
        "block_tables": np.arange(8, dtype=np.int32).reshape(2, 4),
        "kv_lens": np.array([4, 8], np.int32),
        "q_lens": np.array([3, 2], np.int32),
    } | changed
    return paged_kv_compress(**arguments, **R4)


# ------------------------------------------------------------------------------- a mesh in scope


@pytest.mark.parametrize("implementation", (None, "ffi", "xla"))
@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit), ids=str)
@pytest.mark.parametrize("devices", (1, 8))
def test_a_mesh_in_scope_changes_no_value_of_operands_that_are_nowhere(
    devices, axis_type, implementation
):
    mesh = jax.make_mesh(
        (devices,), ("x",), axis_types=(axis_type,), devices=jax.devices("cpu")[:devices]
    )
    raw = dict(zip(OPERAND_NAMES, cases.make_operands(CASE).astuple(), strict=True))
    operands = cases.make_operands(CASE)
    state, tables = CompressorState(raw["kv"], raw["score"]), raw["kv_tables"]
    convert = functools.partial(raw_to_prefix, **R4, implementation=implementation)
    want = run(CASE, operands, "ffi", jax.devices("cpu")[0])
    earlier = [jnp.asarray(x) for x in operands.astuple()]
    before = init_state(8, 4, head_dim=128, **R4)
    prefixes = convert(state, tables, raw["kv_lens"])
    with jax.set_mesh(mesh):
        step = step_of(CASE, implementation)
        for given in (operands.astuple(), earlier):
            for got in (step(*given), jax.jit(step)(*given)):
                check_results(Results(*map(np.asarray, got)), want)
        call(state=before)
        convert(before, np.zeros((2, 4), np.int32), np.array([4, 8], np.int32))
        empty = init_state(8, 4, head_dim=128, **R4)  # placed by JAX, as it likes
        call(state=empty)
        jax.jit(lambda state: call(state=state))(empty)
        converted = convert(state, tables, raw["kv_lens"])
        np.testing.assert_allclose(converted.score, prefixes.score, rtol=1e-5)
        windows = completed_windows(raw["kv_lens"], **R4, next_n=3)
        counts = num_compressed(raw["kv_lens"], **R4, next_n=3)
        np.testing.assert_array_equal(windows.valid.sum(1), counts)


@pytest.mark.parametrize("name", ("kv_score", "state", "kv_lens", "kv_tables"))
@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit), ids=str)
@pytest.mark.parametrize("jitted", (True, False), ids=["jit", "eager"])
def test_what_is_not_mapped_is_broadcast_over_the_mapped_axis_of_a_mesh(name, axis_type, jitted):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,), devices=jax.devices("cpu")[:8])
    groups = [cases.make_operands(CASE, seed).astuple() for seed in range(8)]
    unmapped = STATE if name == "state" else (OPERAND_NAMES.index(name),)
    in_axes = tuple(None if i in (1, *unmapped) else 0 for i in range(len(OPERAND_NAMES)))
    arrays = [
        np.stack([group[i] for group in groups]) if axis == 0 else groups[0][i]
        for i, axis in enumerate(in_axes)
    ]
    step = jax.vmap(step_of(CASE), in_axes)
    want = Results(*map(np.asarray, jax.jit(step)(*arrays)))
    specs = [jax.P("x") if axis == 0 else jax.P() for axis in in_axes]
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, jax.NamedSharding(mesh, spec))
            for x, spec in zip(arrays, specs, strict=True)
        ]
        got = (jax.jit(step) if jitted else step)(*placed)
    check_results(Results(*map(np.asarray, got)), want)
    for result in got:
        assert result.sharding.shard_shape(result.shape)[0] == 1


# ------------------------------------------------------------------------------ what is not traced


@pytest.mark.parametrize("form", ("eager", "jit", "vmap", "lower"))
def test_where_the_kernel_runs_the_reference_is_not_traced(form, monkeypatch):
    def traced(*operands, **options):
        raise AssertionError("the reference was traced")

    monkeypatch.setitem(vars(decode_module.DECODE), "reference", traced)  # which is frozen
    # Shapes that no other test has, so that nothing is cached.
    batch = {"eager": 5, "jit": 6, "vmap": 7, "lower": 9}[form]
    rows = np.ones((batch, 2, 512), np.float32)
    tables, lens = np.zeros((batch, 3), np.int32), np.full(batch, 4, np.int32)
    state = init_state(11, 4, head_dim=128, **R4)

    def step(rows, state):
        return paged_kv_compress(rows, None, state, tables, lens, **R4)

    if form == "eager":
        step(rows, state)
    elif form == "jit":
        jax.jit(step)(rows, state)
    elif form == "vmap":
        jax.vmap(step, (0, None))(np.stack([rows] * 2), state)
    else:
        platforms = ("cpu", "cuda")[: 1 + _ffi.HAS_CUDA]
        jax.jit(step).trace(rows, state).lower(lowering_platforms=platforms)
    with pytest.raises(AssertionError, match="was traced"):
        jax.jit(step).trace(rows, state).lower(lowering_platforms=("tpu",))


def test_tracing_starts_no_backend():
    script = """
import functools, jax, jax.numpy as jnp, numpy as np, jax_dsv4
R4 = {"compress_ratio": 4}
shape = jax.ShapeDtypeStruct
lens, tables = shape((2,), jnp.int32), shape((2, 4), jnp.int32)
for layers in (None, 3):
    state = jax.eval_shape(lambda: jax_dsv4.init_state(8, 4, head_dim=128, layers=layers, **R4))
    layer = None if layers is None else 1
    step = functools.partial(jax_dsv4.paged_kv_compress, layer=layer, **R4)
    rows = shape((2, 3, 512), jnp.float32)
    jax.eval_shape(step, rows, None, state, tables, lens)
    jax.make_jaxpr(step)(rows, shape((4, 256), jnp.float32), state, tables, lens)
    jax.eval_shape(functools.partial(jax_dsv4.raw_to_prefix, **R4), state, tables, lens)
known = np.zeros((2, 4), np.int32), np.array([4, 8], np.int32)
jax.eval_shape(lambda x: jax_dsv4.paged_kv_compress(
    x, np.ones((4, 256), np.float32), jax_dsv4.init_state(8, 4, head_dim=128, **R4), *known,
    q_lens=known[1], **R4), rows)
jax.eval_shape(functools.partial(jax_dsv4.completed_windows, next_n=2, **R4), lens)
jax_dsv4.slot_tables(2, 8, 4, next_n=1, **R4)
jax.distributed.initialize("localhost:23456", 1, 0)  # raises once a backend was started
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_nothing_is_compiled_by_the_next_eager_call():
    layers = init_state(8, 4, head_dim=128, **R4, layers=2)
    tables, lens = np.zeros((2, 4), np.int32), np.array([4, 8], np.int32)
    calls = (
        lambda: call(),
        lambda: jax.vmap(lambda rows: call(kv_score=rows))(np.ones((2, 2, 3, 512), np.float32)),
        lambda: raw_to_prefix(layers, tables, lens, **R4),
    )
    events = []

    def listen(event, duration, **kwargs):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for again in calls:
            jax.block_until_ready(again())
            events.clear()
            jax.block_until_ready(again())
            assert not events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


TABLES = jax_dsv4.CacheTables(
    np.arange(8, dtype=np.int32).reshape(2, 4), np.zeros((2, 2), np.int32)
)
LENGTHS = np.array([4, 8], np.int32)


@pytest.mark.parametrize(
    "call_one",
    [
        lambda c, cache, rows, values: paged_kv_compress(
            rows, c.ape, cache.state, TABLES.state, LENGTHS, **R4
        ),
        lambda c, cache, rows, values: jax_dsv4.store_records(
            values, LENGTHS, LENGTHS, cache.records
        ),
        lambda c, cache, rows, values: jax_dsv4.dequantize_records(cache.records, LENGTHS),
        lambda c, cache, rows, values: jax_dsv4.decode_records(rows, c, cache, TABLES, LENGTHS),
    ],
    ids=["decode", "store", "dequantize", "decode_records"],
)
def test_a_call_is_one_operation_of_jax(call_one):
    """Operands that are not there cost none: in an eager call each would be a dispatch."""
    records = jax_dsv4.init_records(4, 4, head_dim=128, format="fp8")
    cache = jax_dsv4.CompressorCache(init_state(8, 4, head_dim=128, **R4), records)
    compressor = jax_dsv4.Compressor(jnp.ones((4, 256)), None, None, head_dim=128, **R4)
    jaxpr = jax.make_jaxpr(call_one)(compressor, cache, jnp.ones((2, 3, 512)), jnp.ones((2, 128)))
    assert [equation.primitive.name for equation in jaxpr.eqns] == ["paged_operation"]


def test_values_are_the_same_where_jax_compiles_nothing():
    layers = init_state(8, 4, head_dim=128, **R4, layers=2)
    tables, lens = np.zeros((2, 4), np.int32), np.array([4, 8], np.int32)
    want = call()[0], raw_to_prefix(layers, tables, lens, **R4).kv
    with jax.disable_jit():
        got = jax.jit(call)()[0], raw_to_prefix(layers, tables, lens, **R4).kv
    jax.tree.map(np.testing.assert_array_equal, got, want)


# By GSPMD, JAX itself splits no axis in parts.
@pytest.mark.parametrize(
    ("shape", "shardy"), [((8,), True), ((2, 4), True), ((4, 4), True), ((8,), False)], ids=str
)
def test_groups_over_a_part_of_an_axis(shape, shardy):
    """Requests split over an Auto axis become groups of any shape."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:8])
    count = int(np.prod(shape))
    groups = [cases.make_operands(CASE, seed).astuple() for seed in range(count)]
    arrays = [np.stack([group[i] for group in groups]) for i in range(len(OPERAND_NAMES))]
    step = step_of(CASE)
    for _ in shape:
        step = jax.vmap(step)

    def program(*flat):
        return step(*(x.reshape(*shape, *x.shape[1:]) for x in flat))

    want = jax.jit(program)(*arrays)
    before = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", shardy)
    try:
        placed = jax.device_put(arrays, jax.NamedSharding(mesh, jax.P("a")))
        got = jax.jit(program)(*placed)
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)
    check_results(Results(*map(np.asarray, got)), Results(*map(np.asarray, want)))


def test_a_state_that_all_devices_share_is_converted_by_each():
    devices = jax.devices("cpu")[:2]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    state = init_state(8, 4, head_dim=128, **R4, layers=2)
    tables, lens = np.zeros((4, 4), np.int32), np.array([4, 8, 3, 1], np.int32)
    convert = functools.partial(raw_to_prefix, **R4)
    split = jax.shard_map(
        convert, mesh=mesh, in_specs=(jax.P(), jax.P("x"), jax.P("x")), out_specs=jax.P("x")
    )
    assert jax.jit(split)(state, tables, lens).kv.shape == (4, 8, 4, 256)


def test_operands_on_different_devices_are_named():
    first, second = jax.devices("cpu")[:2]
    rows = jax.device_put(np.ones((2, 3, 512), np.float32), first)
    state = jax.device_put(init_state(8, 4, head_dim=128, **R4), second)
    with pytest.raises(ValueError, match="kv_score"):
        call(kv_score=rows, state=state)


# ----------------------------------------------------------------------------- integers and arrays


@pytest.mark.parametrize("dtype", (np.uint8, np.uint32, np.uint64, np.int16, np.int64))
def test_integers_of_numpy_are_those_of_python(dtype):
    def of(kind):
        pool = PagePool(kind(9), kind(2), kind(8), page_size=kind(4), compress_ratio=kind(4))
        pool.hold(kind(1), kind(0), kind(9))
        pool.hold(kind(1), kind(9), kind(3))
        held = np.array(pool.tables)
        pool.release(kind(1))
        step = {"compress_ratio": kind(4), "next_n": kind(4)}
        return (
            held.tolist(),
            live_pages(kind(0), kind(4), **step),
            live_pages(kind(3), kind(4), **step, format="prefix"),
            live_pages(kind(120), kind(4), **step),
            pages_needed(kind(4), **step),
            [np.array(x).tolist() for x in slot_tables(kind(3), kind(100), kind(4), **step)],
            np.array(num_compressed(np.array([4], np.int32), **step)).tolist(),
            init_state(kind(2), kind(4), head_dim=kind(128), compress_ratio=kind(4)).kv.shape,
        )

    assert of(dtype) == of(int)


BIG = np.array([2**32 + 4, 8])
LENS = {
    "64 bits": BIG,
    "64 bits that fit": BIG % 16,
    "unsigned 64 bits": BIG.astype(np.uint64),
    "a Python integer that does not fit": [2**32 + 4, 8],
    "fractions": np.array([4.9, 8]),
    "fractions in a list": [4.9, 8.0],
    "bool": np.array([True, False]),
    "foreign byte order": np.array([4, 8], np.dtype(np.int32).newbyteorder()),
    "no numbers": np.array(["4", "8"]),
    "no dtype of NumPy's": types.SimpleNamespace(shape=(2,), dtype=object()),
    "no array": object(),
    "arrays of 64 bits in a list": [np.array(2**32 + 4), np.array(8)],
    "a masked array": np.ma.masked_array(np.array([4, 8], np.int32), [True, False]),
}
RECEIVERS = {
    "num_compressed": lambda lens: num_compressed(lens, **R4, next_n=1),
    "completed_windows": lambda lens: completed_windows(lens, **R4, next_n=1),
    "paged_kv_compress": lambda lens: call(kv_lens=lens),
    "raw_to_prefix": lambda lens: raw_to_prefix(
        init_state(8, 4, head_dim=128, **R4), np.zeros((2, 4), np.int32), lens, **R4
    ),
}


@pytest.mark.parametrize("receiver", RECEIVERS)
@pytest.mark.parametrize("lens", LENS)
def test_no_array_is_converted_behind_the_callers_back(lens, receiver):
    with pytest.raises(TypeError, match=r"^kv_lens: expected "):
        RECEIVERS[receiver](LENS[lens])


@pytest.mark.parametrize("name", ("kv_score", "ape", "block_tables", "q_lens"))
def test_foreign_arrays_are_named(name):
    dtype = np.int32 if name in ("block_tables", "q_lens") else np.float32
    swapped = np.ones((2, 3, 512) if name == "kv_score" else (4, 256), dtype).byteswap()
    foreign = types.SimpleNamespace(shape=swapped.shape, dtype="no dtype")
    for x in (swapped.view(np.dtype(dtype).newbyteorder()), foreign, [["x"]]):
        with pytest.raises(TypeError, match=rf"^{name}: expected "):
            call(**{name: x})


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("jitted", (True, False), ids=["jit", "eager"])
@pytest.mark.parametrize("name", ("kv_score", "ape", "state", "block_tables", "kv_lens", "q_lens"))
def test_operands_in_host_memory_are_named(name, jitted):
    host = SingleDeviceSharding(jax.devices("cpu")[0], memory_kind="pinned_host")
    arguments = {
        "kv_score": np.ones((2, 3, 512), np.float32),
        "ape": np.ones((4, 256), np.float32),
        "state": init_state(8, 4, head_dim=128, **R4),
        "block_tables": np.zeros((2, 4), np.int32),
        "kv_lens": np.array([4, 8], np.int32),
        "q_lens": np.array([4, 8], np.int32),
    }
    x = jax.device_put(arguments[name], host)

    def step(x):
        return call(**{name: x})

    with pytest.raises(ValueError, match=rf"^{name}.*: expected an array in the device's memory"):
        (jax.jit(step, donate_argnums=0) if jitted else step)(x)


def test_a_state_in_references_is_updated_in_place():
    state = init_state(8, 4, head_dim=128, **R4)
    want_comp, want = call(state=state)
    kv, score = jax.new_ref(jnp.copy(state.kv)), jax.new_ref(jnp.copy(state.score))

    @jax.jit
    def step(kv, score):
        kv_comp, new = call(state=CompressorState(kv[...], score[...]))
        kv[...], score[...] = new.kv, new.score
        return kv_comp

    memory = step.lower(kv, score).compile().memory_analysis()
    assert memory.alias_size_in_bytes == state.kv.nbytes + state.score.nbytes
    assert memory.temp_size_in_bytes < state.kv.nbytes
    np.testing.assert_array_equal(step(kv, score), want_comp)
    np.testing.assert_array_equal(kv[...], want.kv)
    np.testing.assert_array_equal(score[...], want.score)


@pytest.mark.parametrize("jitted", (False, True))
def test_a_reference_itself_is_refused(jitted):
    state = init_state(8, 4, head_dim=128, **R4)
    kv, score = jax.new_ref(state.kv), jax.new_ref(state.score)

    def step(kv, score):
        return call(state=CompressorState(kv, score))[0]

    with pytest.raises(TypeError, match=r"^state\.kv: .* got a reference; read it: ref\[\.\.\.\]"):
        (jax.jit(step) if jitted else step)(kv, score)


# ------------------------------------------------------------------------------------- checkpoints


def leaves_of(state):
    """As checkpoints know them."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.parametrize("layers", (None, 2))
def test_leaves_of_different_formats_have_different_names(layers):
    raw, prefix = (
        init_state(3, 4, head_dim=128, **R4, layers=layers, format=format)
        for format in jax_dsv4.STATE_FORMATS
    )
    assert not leaves_of(raw).keys() & leaves_of(prefix).keys()
    for state in (raw, prefix):
        assert pickle.loads(pickle.dumps(state)).format == state.format
        assert jax.tree.map(lambda x: x, state).format == state.format
    with pytest.raises(ValueError, match="pytree"):
        jax.tree.map(lambda a, b: a, raw, prefix)


@pytest.mark.parametrize("restored", jax_dsv4.STATE_FORMATS)
@pytest.mark.parametrize("saved", jax_dsv4.STATE_FORMATS)
@pytest.mark.parametrize("layers", (None, 2))
def test_a_checkpoint_is_restored_in_its_own_format_only(saved, restored, layers, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")

    def state_of(format):
        state = init_state(3, 4, head_dim=128, **R4, layers=layers, format=format)
        return {"compressors": [state, state]}

    with ocp.StandardCheckpointer() as checkpointer:
        tree = jax.tree.map(lambda x: x + 1, state_of(saved))
        checkpointer.save(tmp_path / "step", tree)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: state_of(restored))
        if saved != restored:
            with pytest.raises(ValueError, match=r"(?i)structure"):
                checkpointer.restore(tmp_path / "step", target)
            return
        got = checkpointer.restore(tmp_path / "step", target)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, got, tree)


# ----------------------------------------------------------------------------------- large numbers


@pytest.mark.parametrize("implementation", ("ffi", "xla"))
@pytest.mark.parametrize("kind", cases.SMALL_KINDS, ids=str)
def test_a_raw_mean_is_right_up_to_its_documented_limit(kind, implementation, device):
    rows = kind.compress_ratio * (1 + kind.overlap)
    largest = np.float32(0.99 * float(np.finfo(np.float32).max) / rows)
    S, length = kind.state_dim, 2 * kind.compress_ratio
    step = functools.partial(
        paged_kv_compress,
        compress_ratio=kind.compress_ratio,
        overlap=kind.overlap,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    with jax.default_device(device):
        for format in jax_dsv4.STATE_FORMATS:
            value = largest if format == "raw" else np.float32(3e38)
            state = init_state(1, length, head_dim=kind.head_dim, format=format, **_of(kind))
            new = np.full((1, length, S), value), np.zeros((1, length, S), np.float32)
            table, lens = np.zeros((1, 1), np.int32), np.array([length], np.int32)
            kv_comp, _ = step(new, None, state, table, lens)
            np.testing.assert_allclose(kv_comp, value, rtol=1e-5)


def _of(kind):
    return {"compress_ratio": kind.compress_ratio, "overlap": kind.overlap}


# -------------------------------------------------------------------------- reloads and installing


def test_modules_can_be_reloaded_in_any_order():
    script = """
import importlib, random, sys, numpy as np, jax_dsv4
names = sorted(name for name in sys.modules if name.startswith("jax_dsv4"))
before = jax_dsv4.init_state(8, 4, head_dim=128, compress_ratio=4)
for seed in range(4):
    random.Random(seed).shuffle(names)
    for name in names:
        importlib.reload(sys.modules[name])
    for state in (before, jax_dsv4.init_state(8, 4, head_dim=128, compress_ratio=4)):
        jax_dsv4.paged_kv_compress(
            np.ones((1, 1, 512), np.float32), None, state, np.zeros((1, 1), np.int32),
            np.array([1], np.int32), compress_ratio=4)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("header", (None, b"", b"#define XLA_FFI_API_MAJOR 0", b"\xff\xfe"))
def test_a_jaxlib_without_headers_gets_a_text_that_helps(header, monkeypatch, tmp_path):
    path = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    if header is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(header)
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    with pytest.raises(ImportError, match=r"reinstall jaxlib"):
        _ffi._running_ffi_version()


def test_completed_windows_eagerly_on_explicit_axes():
    mesh = jax.make_mesh(
        (8,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices("cpu")[:8]
    )
    lens = jax.device_put(np.full((8, 3), 8, np.int32), jax.NamedSharding(mesh, jax.P("a")))
    done = jax.vmap(lambda x: completed_windows(x, compress_ratio=4, next_n=1))(lens)
    assert np.all(done.valid) and np.all(np.asarray(done.window) == 1)
