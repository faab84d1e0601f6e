"""Group dimensions over a mesh of 8 CPU devices: equal to one device, in place, no collective."""

import dataclasses
import functools

import cases
import jax
import numpy as np
import pytest
from cases import OPERAND_NAMES
from checks import COLLECTIVE, STATE, Results, check_results, step_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_dsv4 import CompressorState, dequantize_records, init_records, raw_to_prefix
from jax_dsv4.decode import DECODE

SHARED = ("ape",)  # by all groups
MESHES = {"1-D": {"a": 8}, "2-D": {"a": 4, "b": 2}}
AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def make_mesh(sizes, axis_type):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes), devices=cpus()
    )


def cpus():
    return jax.devices("cpu")[:8]


def in_axes():
    return tuple(None if name in SHARED else 0 for name in OPERAND_NAMES)


def grouped(step, depth):
    """``step`` on operands with ``depth`` leading group dimensions."""
    for _ in range(depth):
        step = jax.vmap(step, in_axes=in_axes())
    return lambda *operands: Results(*step(*operands))


@functools.cache
def grouped_operands(case, *sizes):
    count = int(np.prod(sizes))
    groups = [cases.make_operands(case, seed).astuple() for seed in range(count)]
    stacked = [
        np.stack(arrays).reshape(*sizes, *arrays[0].shape) for arrays in zip(*groups, strict=True)
    ]
    return [groups[0][i] if name in SHARED else stacked[i] for i, name in enumerate(OPERAND_NAMES)]


@functools.cache
def one_device_results(case, *sizes):
    step = grouped(step_of(case, "ffi"), len(sizes))
    return Results(*map(np.asarray, jax.jit(step)(*grouped_operands(case, *sizes))))


def specs(axes):
    return [P() if name in SHARED else P(*axes) for name in OPERAND_NAMES]


def put(case, mesh, sizes, operand_specs):
    return [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(grouped_operands(case, *sizes), operand_specs, strict=True)
    ]


def check_program(program, arrays, case, sizes):
    """Donating: equal to one device, its share of the state in place, no collective."""
    compiled = program.lower(*arrays).compile()
    share = sum(arrays[i].nbytes for i in STATE) // len(cpus())
    memory = compiled.memory_analysis()
    assert not COLLECTIVE.findall(compiled.as_text())
    assert memory.alias_size_in_bytes == share
    assert memory.temp_size_in_bytes < share / 4
    results = program(*arrays)
    want = one_device_results(case, *sizes)
    check_results(Results(*map(np.asarray, results)), want, case.state_format)
    for result in results:
        assert result.sharding.shard_shape(result.shape)[: len(sizes)] == (1,) * len(sizes)


@pytest.mark.parametrize("implementation", (None, "ffi"))
@pytest.mark.parametrize("in_scope", (True, False), ids=["mesh in scope", "mesh of the operands"])
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("case", cases.in_formats([cases.MAPPED]), ids=str)
def test_jit_splits_the_groups(case, sizes, axis_type, in_scope, implementation):
    mesh = make_mesh(sizes, AXIS_TYPES[axis_type])
    arrays = put(case, mesh, sizes.values(), specs(sizes))
    step = grouped(step_of(case, implementation), len(sizes))
    program = jax.jit(step, donate_argnums=STATE)
    if in_scope:
        with jax.set_mesh(mesh):
            check_program(program, arrays, case, tuple(sizes.values()))
    else:
        check_program(program, arrays, case, tuple(sizes.values()))


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("axes", ["a", "b", ("a", "b"), ("b", "a")], ids=str)
@pytest.mark.parametrize("sizes", [(3, 2), (2, 3)], ids=str)
def test_the_groups_are_split_over_any_number_of_devices(sizes, axes, axis_type):
    devices = np.array(cpus()[:6]).reshape(sizes)
    mesh = jax.sharding.Mesh(devices, ("a", "b"), axis_types=(AXIS_TYPES[axis_type],) * 2)
    arrays = put(cases.MAPPED, mesh, (6,), specs([axes]))
    program = jax.jit(grouped(step_of(cases.MAPPED, "ffi"), 1), donate_argnums=STATE)
    compiled = program.lower(*arrays).compile()
    num_parts = int(np.prod([mesh.shape[axis] for axis in axes]))
    assert not COLLECTIVE.findall(compiled.as_text())
    share = sum(arrays[i].nbytes for i in STATE) // num_parts
    assert compiled.memory_analysis().alias_size_in_bytes == share
    results = Results(*map(np.asarray, program(*arrays)))
    check_results(results, one_device_results(cases.MAPPED, 6), cases.MAPPED.state_format)


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_jit_splits_the_groups_of_a_conversion(axis_type):
    mesh = make_mesh(MESHES["1-D"], AXIS_TYPES[axis_type])
    case = dataclasses.replace(cases.MAPPED, dtypes=cases.BF16_IN_F32_STATE)
    operands = dict(zip(OPERAND_NAMES, put(case, mesh, (8,), specs(MESHES["1-D"])), strict=True))
    state = CompressorState(operands["kv"], operands["score"])
    convert = functools.partial(raw_to_prefix, compress_ratio=case.ratio)
    arrays = state, operands["kv_tables"], operands["kv_lens"]
    program = jax.jit(jax.vmap(convert), donate_argnums=0)
    alone = [convert(*jax.tree.map(lambda x, i=i: np.asarray(x)[i], arrays)) for i in range(8)]
    compiled = program.lower(*arrays).compile()
    assert not COLLECTIVE.findall(compiled.as_text())
    assert compiled.memory_analysis().alias_size_in_bytes == 2 * state.kv.nbytes // 8
    got = program(*arrays)
    for i, want in enumerate(alone):
        np.testing.assert_array_equal(np.asarray(got.kv)[i], want.kv)
        np.testing.assert_array_equal(np.asarray(got.score)[i], want.score)


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("unmapped", range(3), ids=("state", "tables", "kv_lens"))
def test_groups_of_a_conversion_share_an_operand(unmapped, axis_type):
    mesh = make_mesh(MESHES["1-D"], AXIS_TYPES[axis_type])
    rng = np.random.default_rng(0)
    kv, score = rng.standard_normal((2, 8, 6, 4, 256), np.float32)
    tables = rng.permuted(np.tile(np.arange(6, dtype=np.int32), (8, 1)), axis=1).reshape(8, 2, 3)
    arrays = [CompressorState(kv, score), tables, rng.integers(0, 13, (8, 2), dtype=np.int32)]
    arrays[unmapped] = jax.tree.map(lambda x: x[0], arrays[unmapped])
    axes = tuple(None if i == unmapped else 0 for i in range(3))
    convert = functools.partial(raw_to_prefix, compress_ratio=4)
    stack = functools.partial(jax.tree.map, lambda x: np.stack([x] * 8))
    each = [stack(x) if i == unmapped else x for i, x in enumerate(arrays)]
    alone = [convert(*jax.tree.map(lambda x, g=g: x[g], each)) for g in range(8)]
    placed = [
        x if i == unmapped else jax.device_put(x, NamedSharding(mesh, P("a")))
        for i, x in enumerate(arrays)
    ]
    got = jax.jit(jax.vmap(convert, in_axes=axes))(*placed)
    for g, want in enumerate(alone):
        np.testing.assert_array_equal(np.asarray(got.kv)[g], want.kv)
        np.testing.assert_array_equal(np.asarray(got.score)[g], want.score)


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("case", cases.in_formats([cases.MAPPED]), ids=str)
def test_jit_splits_the_groups_of_the_reference(case, axis_type):
    sizes = MESHES["1-D"]
    mesh = make_mesh(sizes, AXIS_TYPES[axis_type])
    arrays = put(case, mesh, sizes.values(), specs(sizes))
    program = jax.jit(grouped(step_of(case, "xla"), 1))
    assert not COLLECTIVE.findall(program.lower(*arrays).compile().as_text())
    results = Results(*map(np.asarray, program(*arrays)))
    check_results(results, one_device_results(case, *sizes.values()), case.state_format)


@pytest.mark.parametrize("implementation", (None, "ffi", "xla"))
@pytest.mark.parametrize("manual", [("a", "b"), ("a",)], ids=["full", "partial"])
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_shard_map_runs_the_groups_of_a_device(axis_type, manual, implementation):
    sizes = (4, 2)
    mesh = make_mesh(MESHES["2-D"], AXIS_TYPES[axis_type])
    step = grouped(step_of(cases.MAPPED, implementation), 2)
    in_specs = tuple(specs(manual))

    def program(*operands):
        return jax.shard_map(
            step, mesh=mesh, in_specs=in_specs, out_specs=P(*manual), axis_names=set(manual)
        )(*operands)

    program = jax.jit(program, donate_argnums=STATE)
    arrays = put(cases.MAPPED, mesh, sizes, in_specs)
    assert not COLLECTIVE.findall(program.lower(*arrays).compile().as_text())
    want = one_device_results(cases.MAPPED, *sizes)
    check_results(Results(*map(np.asarray, program(*arrays))), want)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("state.kv", P(None, None, "a")),
        ("state.score", P(None, None, None, "a")),
        ("kv_score", P(None, None, None, "a")),
    ],
    ids=str,
)
def test_what_cannot_be_sharded_is_named_with_the_remedy(name, spec):
    mesh = make_mesh(MESHES["1-D"], AxisType.Explicit)
    operand = OPERAND_NAMES.index(name.removeprefix("state."))
    operand_specs = [spec if i == operand else P() for i in range(len(OPERAND_NAMES))]
    step = jax.jit(grouped(step_of(cases.MAPPED), 1))
    with pytest.raises(ValueError, match=rf"^{name}: expected no sharding but .*jax\.vmap"):
        step.trace(*put(cases.MAPPED, mesh, (8,), operand_specs))


def test_one_device_needs_no_partitioning():
    step = grouped(step_of(cases.MAPPED, "ffi"), 1)
    text = jax.jit(step).lower(*grouped_operands(cases.MAPPED, 8)).as_text()
    assert DECODE.target in text
    assert "CustomSPMDPartitioning" not in text and "sdy." not in text


@pytest.mark.parametrize("axes", ("b", ("b", "a"), "a", ("a", "b")), ids=str)
def test_groups_over_any_axis_cost_no_collective(axes):
    mesh = jax.make_mesh(
        (4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:8]
    )
    records = init_records(4, 3, head_dim=128, format="fp8")
    pools = np.random.default_rng(0).integers(0, 126, (8, *records.pool.shape), np.uint8)
    slots = np.zeros((8, 5), np.int32)
    split = jax.device_put((pools, slots), NamedSharding(mesh, P(axes)))
    read = jax.vmap(lambda p, s: dequantize_records(dataclasses.replace(records, pool=p), s))
    text = jax.jit(read).lower(*split).compile().as_text()
    assert not COLLECTIVE.findall(text)
    np.testing.assert_array_equal(jax.jit(read)(*split), read(pools, slots))
