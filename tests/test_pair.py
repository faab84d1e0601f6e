"""kv_score as a pair (kv, score), for engines that project them apart."""

import functools
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import COLLECTIVE, Results, arguments, check_results, run, step_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_errors import spec

from jax_dsv4 import CompressorState, init_state, paged_kv_compress

IMPLEMENTATIONS = ("ffi", "xla")
CASES = tuple(c for c in cases.IN_REGIMES if c.regime == "ragged")


def apart(operands, device):
    kv_score, *rest = arguments(operands, device)
    return tuple(jnp.split(kv_score, 2, axis=-1)), *rest


@pytest.mark.parametrize(
    ("case", "implementation"),
    [(case, "ffi") for case in cases.in_formats(CASES)] + [(CASES[0], "xla")],
    ids=str,
)
def test_a_pair_is_the_two_halves(case, implementation, device):
    operands = cases.make_operands(case)
    want = run(case, operands, implementation, device)
    got = jax.jit(step_of(case, implementation))(*apart(operands, device))
    check_results(Results(*map(np.asarray, got)), want, case.state_format)


def test_a_pair_is_taken_without_a_copy(device):
    case = cases.MAPPED
    kv_score, *rest = apart(cases.make_operands(case), device)
    program = jax.jit(step_of(case, "ffi"), donate_argnums=(2, 3))
    text = program.lower(kv_score, *rest).compile().as_text()
    assert not re.findall(r"= \S+ (?:concatenate|copy|fusion)\(", text)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_maps_either_half(mapped, implementation, device):
    case, count = cases.MAPPED, 2
    first, second = (cases.make_operands(case, seed) for seed in range(count))
    halves = [
        jnp.stack(pair) if axis == 0 else pair[0]
        for pair, axis in zip(
            zip(apart(first, device)[0], apart(second, device)[0], strict=True),
            mapped,
            strict=True,
        )
    ]
    rest = apart(first, device)[1:]
    step = step_of(case, implementation)
    program = jax.jit(jax.vmap(step, in_axes=(mapped, *[None] * len(rest))))
    got = program(tuple(halves), *rest)
    for i in range(count):
        own = tuple(x if axis is None else x[i] for x, axis in zip(halves, mapped, strict=True))
        want = jax.jit(step)(own, *rest)
        check_results(Results(*(np.asarray(x)[i] for x in got)), Results(*map(np.asarray, want)))


@pytest.mark.parametrize("mapped", [(0, None), (0, 0)], ids=str)
@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit), ids=str)
def test_on_a_mesh_the_groups_of_either_half_are_split(axis_type, mapped):
    case, cpus = cases.MAPPED, jax.devices("cpu")[:8]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,), devices=cpus)
    groups = [apart(cases.make_operands(case, seed), cpus[0]) for seed in range(8)]
    pair, *rest = jax.tree.map(lambda *xs: np.stack(xs), *groups)
    pair = tuple(x if axis == 0 else x[0] for x, axis in zip(pair, mapped, strict=True))
    step = jax.vmap(step_of(case, "ffi"), (mapped, *[0] * len(rest)))
    want = Results(*map(np.asarray, jax.jit(step)(pair, *rest)))
    split, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    halves = tuple(
        jax.device_put(x, split if axis == 0 else whole)
        for x, axis in zip(pair, mapped, strict=True)
    )
    operands = halves, *jax.device_put(rest, split)
    program = jax.jit(step, donate_argnums=(2, 3))
    assert not COLLECTIVE.findall(program.lower(*operands).compile().as_text())
    check_results(Results(*map(np.asarray, program(*operands))), want)


@pytest.mark.parametrize(
    ("pair", "error", "text"),
    [
        ((spec(2, 3, 256),), ValueError, r"kv_score: expected a pair \(kv, score\), got 1 arrays"),
        ((spec(2, 3, 512), spec(2, 3, 512)), ValueError, r"kv_score\[0\]: expected .* 256"),
        ((spec(2, 3, 256), spec(2, 4, 256)), ValueError, r"kv_score\[1\]: expected .*3, 256"),
        ((spec(2, 3, 256), spec(2, 3, 256, dtype=jnp.bfloat16)), TypeError, r"kv_score\[1\]: "),
        ((spec(2, 3, 256), spec(2, 3, 256, dtype=jnp.int32)), TypeError, r"kv_score\[1\]: "),
        ((spec(2, 0, 256), spec(2, 0, 256)), ValueError, "kv_score: expected a next_n"),
    ],
)
def test_a_wrong_pair_is_named(pair, error, text):
    state = jax.eval_shape(lambda: init_state(2, 8, head_dim=128, compress_ratio=4))
    tables, lens = spec(2, 1, dtype=jnp.int32), spec(2, dtype=jnp.int32)
    step = functools.partial(paged_kv_compress, compress_ratio=4)
    assert isinstance(state, CompressorState)
    with pytest.raises(error, match=f"^{text}"):
        jax.eval_shape(step, pair, None, state, tables, lens)
