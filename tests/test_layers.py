"""All layers of a kind in one array, and the layer an argument of the call."""

import dataclasses
import functools
import itertools
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPERAND_NAMES
from checks import (
    COLLECTIVE,
    STATE,
    Results,
    arguments,
    check_results,
    check_same_bits,
    run,
    step_of,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_dsv4 import CompressorState, init_state, paged_kv_compress, raw_to_prefix
from jax_dsv4.decode import DECODE

LAYERS = 3
IMPLEMENTATIONS = ("ffi", "xla")
CASES = tuple(
    dataclasses.replace(case, regime=regime, batch=7)
    for case, regime in zip(
        (case for case in cases.NEXT_N if case.next_n == 4),
        itertools.cycle(("bad_pages", "ragged")),
        strict=False,
    )
)


def stacked(case):
    """(one layer's operands each, the operands with the state of all layers)."""
    layers = [cases.make_operands(case, seed) for seed in range(LAYERS)]
    pools = {name: np.stack([getattr(x, name) for x in layers]) for name in ("kv", "score")}
    return layers, dataclasses.replace(layers[0], **pools)


@functools.cache
def alone(case, implementation, device):
    """By layer: the first layer's operands on this layer's pools."""
    layers, _ = stacked(case)
    return [
        run(
            case,
            dataclasses.replace(layers[0], kv=x.kv, score=x.score),
            implementation,
            device,
        )
        for x in layers
    ]


def unrolled(step, layer_of, kv_score, ape, kv, score, *rest):
    kv_comps = []
    for i in range(LAYERS):
        kv, score, kv_comp = step(kv_score, ape, kv, score, *rest, layer_of(i))
        kv_comps.append(kv_comp)
    return Results(kv, score, jnp.stack(kv_comps))


def scanned(step, _, kv_score, ape, kv, score, *rest):
    def body(pools, layer):
        *pools, kv_comp = step(kv_score, ape, *pools, *rest, layer)
        return tuple(pools), kv_comp

    (kv, score), kv_comps = jax.lax.scan(body, (kv, score), jnp.arange(LAYERS, dtype=jnp.int32))
    return Results(kv, score, kv_comps)


def for_looped(step, _, kv_score, ape, kv, score, *rest):
    def body(layer, carry):
        kv, score, kv_comps = carry
        kv, score, kv_comp = step(kv_score, ape, kv, score, *rest, layer)
        return kv, score, kv_comps.at[layer].set(kv_comp)

    shape = jax.eval_shape(step, kv_score, ape, kv, score, *rest, jnp.int32(0)).kv_comp
    kv_comps = jnp.zeros((LAYERS, *shape.shape), shape.dtype)
    bounds = jnp.int32(0), jnp.int32(LAYERS)
    return Results(*jax.lax.fori_loop(*bounds, body, (kv, score, kv_comps)))


LOOPS = {
    "unrolled": (unrolled, int),
    "unrolled, NumPy": (unrolled, np.int64),
    "unrolled, on the device": (unrolled, jnp.int32),
    "scan": (scanned, None),
    "fori_loop": (for_looped, None),
}


@pytest.mark.parametrize(
    ("implementation", "loop"), [*(("ffi", loop) for loop in LOOPS), ("xla", "scan")]
)
@pytest.mark.parametrize("case", cases.in_formats(CASES), ids=str)
def test_every_layer_is_as_one_alone(case, loop, implementation, device):
    function, layer_of = LOOPS[loop]
    _, operands = stacked(case)
    step = functools.partial(function, step_of(case, implementation), layer_of)
    got = jax.jit(step, donate_argnums=STATE)(*arguments(operands, device))
    kv, score, kv_comps = map(np.asarray, got)
    for i, want in enumerate(alone(case, implementation, device)):
        check_results(Results(kv[i], score[i], kv_comps[i]), want, case.state_format)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("layer_of", "index"),
    [
        *itertools.product((int, jnp.int32), (LAYERS, -1, 2**31 - 1, -(2**31))),
        *((int, index) for index in (2**31, -(2**63) - 1)),
    ],
)
@pytest.mark.parametrize("case", cases.in_formats(CASES[:1]), ids=str)
def test_a_layer_that_does_not_exist_reaches_nothing(case, layer_of, index, implementation, device):
    _, operands = stacked(case)
    step = jax.jit(functools.partial(step_of(case, implementation), layer=layer_of(index)))
    kv, score, kv_comp = step(*arguments(operands, device))
    check_same_bits(np.asarray(kv), operands.kv)
    check_same_bits(np.asarray(score), operands.score)
    np.testing.assert_array_equal(np.asarray(kv_comp, np.float32), 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_state_of_no_layers_is_served(implementation, device):
    case = cases.MAPPED
    operands = cases.make_operands(case)
    empty = dataclasses.replace(operands, kv=operands.kv[None][:0], score=operands.score[None][:0])
    for layer in (0, jnp.int32(0)):
        step = functools.partial(step_of(case, implementation), layer=layer)
        kv, _, kv_comp = jax.jit(step)(*arguments(empty, device))
        assert kv.shape == (0, *operands.kv.shape)
        np.testing.assert_array_equal(np.asarray(kv_comp, np.float32), 0)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("case", cases.in_formats([cases.DONATED]), ids=str)
def test_no_layer_is_copied(case, loop, device):
    """One call a layer, in place, and no other work beside it."""
    function, layer_of = LOOPS[loop]
    _, operands = stacked(case)
    sharding = jax.sharding.SingleDeviceSharding(device)
    specs = [
        None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x in operands.astuple()
    ]
    program = jax.jit(
        functools.partial(function, step_of(case, "ffi"), layer_of), donate_argnums=STATE
    )
    compiled = program.lower(*specs).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    state_bytes = operands.kv.nbytes + operands.score.nbytes
    shape = ",".join(map(str, operands.kv.shape))
    assert not re.findall(rf"= f32\[{shape}\]\S* copy", text)
    assert memory.alias_size_in_bytes >= state_bytes
    assert memory.temp_size_in_bytes < state_bytes / 10
    assert text.count(DECODE.target) == (LAYERS if function is unrolled else 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layers", [[2, 0], 1], ids=["a layer per group", "one layer for all"])
@pytest.mark.parametrize("case", cases.in_formats(CASES[:1]), ids=str)
def test_groups_have_layers_of_their_own(case, layers, implementation, device):
    """vmap: groups in front of layers, one launch."""
    groups = [cases.make_operands(case, seed) for seed in range(2 * LAYERS)]
    pools = {
        name: np.stack([getattr(x, name) for x in groups]).reshape(
            2, LAYERS, *getattr(groups[0], name).shape
        )
        for name in ("kv", "score")
    }
    operands = dataclasses.replace(groups[0], **pools)
    in_axes = [0 if name in ("kv", "score") else None for name in OPERAND_NAMES]
    step = jax.vmap(
        step_of(case, implementation), in_axes=(*in_axes, 0 if np.ndim(layers) else None)
    )
    arrays = (*arguments(operands, device), jnp.asarray(layers, jnp.int32))
    kv, score, kv_comp = map(np.asarray, jax.jit(step)(*arrays))
    for group, layer in enumerate(np.broadcast_to(layers, 2)):
        own = dataclasses.replace(
            groups[0], kv=pools["kv"][group, layer], score=pools["score"][group, layer]
        )
        want = run(case, own, implementation, device)
        got = Results(kv[group, layer], score[group, layer], kv_comp[group])
        check_results(got, want, case.state_format)
        others = np.arange(LAYERS) != layer
        check_same_bits(kv[group, others], pools["kv"][group, others])
        check_same_bits(score[group, others], pools["score"][group, others])
    if implementation == "ffi":
        assert jax.jit(step).lower(*arrays).as_text().count(f"@{DECODE.target}(") == 1


@pytest.mark.parametrize("layer_of", [int, jnp.int32], ids=["static", "on the device"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh_the_groups_are_split(axis_type, layer_of):
    case, count = CASES[0], 8
    groups = [cases.make_operands(case, seed) for seed in range(count)]
    devices = jax.devices("cpu")[:count]
    mesh = jax.make_mesh((count,), ("data",), axis_types=(axis_type,), devices=devices)
    arrays, in_axes = [], []
    for name in OPERAND_NAMES:
        values = [getattr(x, name) for x in groups]
        shared = name == "ape"
        if values[0] is None:
            arrays.append(None)
        else:
            array = values[0] if shared else np.stack(values)
            if name in ("kv", "score"):
                array = np.stack([array] * LAYERS, 1)
            spec = P() if shared else P("data")
            arrays.append(jax.device_put(array, NamedSharding(mesh, spec)))
        in_axes.append(None if shared or values[0] is None else 0)

    def step(*operands):
        return step_of(case, "ffi")(*operands, layer=layer_of(1))

    program = jax.jit(jax.vmap(step, in_axes), donate_argnums=STATE)
    compiled = program.lower(*arrays).compile()
    share = sum(arrays[i].nbytes for i in STATE) // count
    assert not COLLECTIVE.findall(compiled.as_text())
    assert compiled.memory_analysis().alias_size_in_bytes == share
    kv, score, kv_comp = map(np.asarray, program(*arrays))
    for i, operands in enumerate(groups):
        own = dataclasses.replace(operands, ape=groups[0].ape)
        want = run(case, own, "ffi", devices[0])
        check_results(Results(kv[i, 1], score[i, 1], kv_comp[i]), want)
        check_same_bits(kv[i, ::2], np.stack([operands.kv] * 2))
        check_same_bits(score[i, ::2], np.stack([operands.score] * 2))


@pytest.mark.parametrize("dtypes", [cases.F32_IN_BF16_STATE, cases.BF16_IN_F32_STATE], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_of_layers_convert_layer_by_layer(case, dtypes, device):
    case = dataclasses.replace(case, dtypes=dtypes)
    layers, operands = stacked(case)
    tables, kv_lens = (operands.kv_tables, operands.score_tables), operands.kv_lens
    windows = {"compress_ratio": case.ratio, "overlap": case.overlap}
    convert = functools.partial(raw_to_prefix, **windows, implementation="ffi")
    state = CompressorState(operands.kv, operands.score)
    got = jax.jit(convert)(*jax.device_put((state, tables, kv_lens), device))
    assert got.format == "prefix"
    for i, layer in enumerate(layers):
        own = jax.device_put((CompressorState(layer.kv, layer.score), tables, kv_lens), device)
        want = jax.jit(convert)(*own)
        check_same_bits(np.asarray(got.kv[i]), np.asarray(want.kv))
        check_same_bits(np.asarray(got.score[i]), np.asarray(want.score))


STATES = {"with": init_state(2, 8, head_dim=128, compress_ratio=4, layers=3)} | {
    "without": init_state(2, 8, head_dim=128, compress_ratio=4)
}


@pytest.mark.parametrize(
    ("state", "layer", "error", "text"),
    [
        ("with", None, ValueError, "layer: expected a state without layers, got .*: layer="),
        ("without", 0, ValueError, "layer: expected a state of layers, got .* layer=None"),
        ("with", 1.0, TypeError, "layer: expected an integer, got 1.0"),
        ("with", "1", TypeError, "layer: expected an integer, got '1'"),
        ("with", jnp.float32(1), TypeError, "layer: expected int32, got float32"),
        ("with", jnp.zeros(1, jnp.int32), ValueError, r"layer: expected shape \[\], got \[1\]"),
    ],
)
def test_a_wrong_layer_is_named(state, layer, error, text):
    operands = jnp.ones((1, 1, 512)), None, STATES[state], jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(error, match=f"^{text}"):
        paged_kv_compress(*operands, jnp.ones(1, jnp.int32), compress_ratio=4, layer=layer)
