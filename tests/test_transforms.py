"""jit, vmap, scan and the like; and that a donated state is updated where it is."""

import functools
import itertools
import os
import re
import subprocess
import sys

import cases
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPERAND_NAMES
from checks import STATE, Results, arguments, check_results, donating, run, step_of

from jax_dsv4.decode import DECODE


def count_calls(text):
    return len(re.findall(rf"custom_call @{DECODE.target}\b", text))


# ------------------------------------------------------------------------------------------- vmap

SIZES = (3, 2)  # of the outer and the inner mapped axis
EVERYTHING = dict.fromkeys(OPERAND_NAMES, 0)
# Per level of vmap, the operands that it maps, and along which axis.
LEVELS = {
    **{f"{name} only": [{name: 0}] for name in OPERAND_NAMES},
    "everything": [EVERYTHING],
    "the state only": [{"kv": 0, "score": 0}],
    "all but the state": [{k: 0 for k in OPERAND_NAMES if k not in ("kv", "score")}],
    "all but ape": [{k: 0 for k in OPERAND_NAMES if k != "ape"}],
    "all but the tables": [{k: 0 for k in OPERAND_NAMES if not k.endswith("tables")}],
    "other axes": [{"kv_score": 2, "kv": 1, "score": -1, "kv_tables": 1, "kv_lens": -1}],
    "everything, everything": [EVERYTHING, EVERYTHING],
    "the state, all but the state": [
        {"kv": 0, "score": 1},
        {k: 0 for k in OPERAND_NAMES if k not in ("kv", "score")},
    ],
    "new tokens, lengths": [{"kv_score": 0}, {"kv_lens": 0, "q_lens": 1}],
    "tables, ape": [{"kv_tables": 1, "score_tables": 0}, {"ape": 2}],
    "ape, ape and the tables": [{"ape": 0}, {"ape": 1, "kv_tables": -1}],
    "all but ape, kv": [{k: 0 for k in OPERAND_NAMES if k != "ape"}, {"kv": 3}],
}


def mapped_index(name, levels, index):
    return tuple(i if name in axes else 0 for axes, i in zip(levels, index, strict=True))


def stacked(name, levels, operands_at, index=()):
    """The operand with the mapped axes of ``levels``, from one per index of these axes."""
    depth = len(index)
    if depth == len(levels):
        return getattr(operands_at[index], name)
    if name not in levels[depth]:
        return stacked(name, levels, operands_at, (*index, 0))
    parts = [stacked(name, levels, operands_at, (*index, i)) for i in range(SIZES[depth])]
    return np.stack(parts, levels[depth][name])


def vmapped(step, levels):
    for axes in reversed(levels):
        step = jax.vmap(step, in_axes=tuple(axes.get(name) for name in OPERAND_NAMES))
    return step


# Where ape and q_lens are None.
BARE_LEVELS = {
    "bare: new tokens": [{"kv_score": 0}],
    "bare: lengths, the state": [{"kv_lens": 0}, {"kv": 0, "score": 0}],
}


# On states of prefixes.
PREFIX_LEVELS = ("kv only", "everything, everything", "tables, ape")


@pytest.mark.parametrize("implementation", ("ffi", "xla"))
@pytest.mark.parametrize(
    ("case", "levels"),
    [(cases.MAPPED, levels) for levels in LEVELS.values()]
    + [(cases.MAPPED_BARE, levels) for levels in BARE_LEVELS.values()]
    + [(cases.MAPPED.in_prefix(), LEVELS[name]) for name in PREFIX_LEVELS],
    ids=[*LEVELS, *BARE_LEVELS, *(f"prefix: {name}" for name in PREFIX_LEVELS)],
)
def test_vmap_equals_a_loop_and_is_one_call(case, levels, implementation, device):
    indices = list(itertools.product(*(range(size) for size in SIZES[: len(levels)])))
    operands_at = {index: cases.make_operands(case, seed) for seed, index in enumerate(indices)}
    together = cases.Operands(*(stacked(name, levels, operands_at) for name in OPERAND_NAMES))
    program = jax.jit(vmapped(step_of(case, implementation), levels))
    arrays = arguments(together, device)
    got = [np.asarray(array) for array in program(*arrays)]
    for index in indices:
        alone = cases.Operands(
            *(getattr(operands_at[mapped_index(k, levels, index)], k) for k in OPERAND_NAMES)
        )
        want = run(case, alone, implementation, device)
        check_results(Results(*(array[index] for array in got)), want, case.state_format)
    assert count_calls(program.lower(*arrays).as_text()) == (implementation == "ffi")


@pytest.mark.parametrize("implementation", ("ffi", "xla"))
def test_nested_vmap_serves_no_requests(implementation, device):
    operands = cases.make_operands(cases.MAPPED)
    for name in ("kv_score", "kv_tables", "score_tables", "kv_lens", "q_lens"):
        setattr(operands, name, getattr(operands, name)[:0])
    operands.kv_lens = np.zeros((3, 0), np.int32)
    operands.kv, operands.score = (np.stack([x, -x]) for x in (operands.kv, operands.score))
    step = vmapped(step_of(cases.MAPPED, implementation), [{"kv": 0, "score": 0}, {"kv_lens": 0}])
    kv, _, kv_comp = jax.jit(step)(*arguments(operands, device))
    assert kv_comp.shape == (2, 3, 0, 1, cases.MAPPED.head_dim)
    np.testing.assert_array_equal(kv, np.stack([operands.kv] * 3, 1))


# ------------------------------------------------------------------------------- jit, scan, shapes


@functools.cache
def token_by_token(case):
    """Three steps of one run: (step, operands of the first step, kv_score and kv_lens of each)."""
    first = cases.make_operands(case)
    kv_scores = np.stack([cases.make_operands(case, seed).kv_score for seed in range(3)])
    kv_lens = np.stack([first.kv_lens + i for i in range(3)])
    return step_of(case, "ffi"), first, kv_scores, kv_lens


@functools.cache
def loop_results(case, device):
    step, first, kv_scores, kv_lens = token_by_token(case)
    _, ape, kv, score, kv_tables, score_tables, _, q_lens = arguments(first, device)
    kv_comps = []
    for i in range(len(kv_scores)):
        kv, score, kv_comp = jax.jit(step)(
            kv_scores[i], ape, kv, score, kv_tables, score_tables, kv_lens[i], q_lens
        )
        kv_comps.append(kv_comp)
    return Results(*(np.asarray(x) for x in (kv, score, jnp.stack(kv_comps))))


def scanned(step, kv_scores, ape, kv, score, kv_tables, score_tables, kv_lens, q_lens):
    def body(state, xs):
        kv_score, kv_lens = xs
        *state, kv_comp = step(kv_score, ape, *state, kv_tables, score_tables, kv_lens, q_lens)
        return tuple(state), kv_comp

    state, kv_comps = jax.lax.scan(body, (kv, score), (kv_scores, kv_lens))
    return Results(*state, kv_comps)


def for_looped(step, kv_scores, ape, kv, score, kv_tables, score_tables, kv_lens, q_lens):
    def body(i, carry):
        kv, score, kv_comps = carry
        kv, score, kv_comp = step(
            kv_scores[i], ape, kv, score, kv_tables, score_tables, kv_lens[i], q_lens
        )
        return kv, score, kv_comps.at[i].set(kv_comp)

    example = jax.eval_shape(
        step, kv_scores[0], ape, kv, score, kv_tables, score_tables, kv_lens[0], q_lens
    )
    kv_comps = jnp.zeros((len(kv_scores), *example.kv_comp.shape), example.kv_comp.dtype)
    return Results(*jax.lax.fori_loop(0, len(kv_scores), body, (kv, score, kv_comps)))


@pytest.mark.parametrize("loop", (scanned, for_looped))
@pytest.mark.parametrize("case", cases.in_formats([cases.MAPPED]), ids=str)
def test_compiled_loops_equal_a_python_loop(case, loop, device):
    step, first, kv_scores, kv_lens = token_by_token(case)
    arrays = arguments(first, device)
    arrays[0], arrays[6] = jnp.array(kv_scores, device=device), jnp.array(kv_lens, device=device)
    got = jax.jit(functools.partial(loop, step), donate_argnums=STATE)(*arrays)
    check_results(Results(*(np.asarray(x) for x in got)), loop_results(case, device))


def test_vmap_inside_scan_equals_scan_inside_vmap_and_is_one_call(device):
    step, first, kv_scores, kv_lens = token_by_token(cases.MAPPED)
    arrays = arguments(first, device)
    arrays[0], arrays[6] = jnp.array(kv_scores, device=device), jnp.array(kv_lens, device=device)
    pools = [jnp.stack([arrays[i], arrays[i][::-1]]) for i in STATE]
    arrays[STATE[0] : STATE[-1] + 1] = pools
    in_axes = (None, None, 0, 0, None, None, None, None)

    inside = jax.jit(functools.partial(scanned, jax.vmap(step, in_axes)))
    outside = jax.jit(jax.vmap(functools.partial(scanned, step), in_axes))
    kv, score, kv_comps = (np.asarray(x) for x in inside(*arrays))
    want = Results(*(np.asarray(x) for x in outside(*arrays)))
    check_results(Results(kv, score, kv_comps.swapaxes(0, 1)), want)
    np.testing.assert_array_equal(want.kv_comp[0], loop_results(cases.MAPPED, device).kv_comp)
    for program in (inside, outside):
        assert count_calls(program.lower(*arrays).as_text()) == 1


@pytest.mark.parametrize("implementation", (None, "ffi", "xla"))
@pytest.mark.parametrize("case", (*cases.CONFIGURATIONS, *cases.NEXT_N), ids=str)
def test_eval_shape_follows_the_operands(case, implementation):
    pool = jax.ShapeDtypeStruct((5, case.page_size, case.state_dim), case.dtypes.state)
    new = (case.batch, case.next_n, 2 * case.state_dim)
    table = jax.ShapeDtypeStruct((case.batch, 7), jnp.int32)
    lens = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    kv, score, kv_comp = jax.eval_shape(
        step_of(case, implementation),
        jax.ShapeDtypeStruct(new, case.dtypes.kv_score),
        jax.ShapeDtypeStruct((case.ratio, case.state_dim), jnp.float32),
        *(pool, pool, table, table, lens, lens),
    )
    for array in (kv, score):
        assert (array.shape, array.dtype) == (pool.shape, pool.dtype)
    assert kv_comp.shape == (case.batch, -(-case.next_n // case.ratio), case.head_dim)
    assert kv_comp.dtype == case.dtypes.out


@pytest.mark.parametrize("implementation", (None, "ffi", "xla"))
def test_eager_calls_equal_jitted_ones(implementation, device):
    case = cases.MAPPED
    operands = cases.make_operands(case)
    eager = step_of(case, implementation)(*arguments(operands, device))
    check_results(
        Results(*(np.asarray(x) for x in eager)), run(case, operands, implementation, device)
    )


def test_a_second_call_traces_and_compiles_nothing(device):
    case = cases.MAPPED
    first, second = (arguments(cases.make_operands(case, seed), device) for seed in range(2))
    eager, jitted = step_of(case), jax.jit(step_of(case))
    events = []

    def listen(event, duration, **kwargs):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for call in (eager, jitted):
            jax.block_until_ready(call(*first))
            assert call is eager or events, "compilations are no longer reported"
            events.clear()
            jax.block_until_ready(call(*second))
            assert not events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# --------------------------------------------------------------------------------- a donated state


def one_call(step, kv_score, pools, *rest):
    (kv, score), (ape, *rest) = pools, rest
    kv, score, kv_comp = step(kv_score, ape, kv, score, *rest)
    return (kv, score), kv_comp


def two_calls(step, kv_score, pools, *rest):
    pools, first = one_call(step, kv_score, pools, *rest)
    pools, second = one_call(step, kv_score, pools, *rest)
    return pools, first + second


def scan(step, kv_score, pools, *rest):
    return jax.lax.scan(lambda p, x: one_call(step, x, p, *rest), pools, jnp.stack([kv_score] * 3))


def layers(step, kv_score, pools, *rest):
    results = [one_call(step, kv_score, layer, *rest) for layer in pools]
    return [pools for pools, _ in results], sum(kv_comp for _, kv_comp in results)


def compiled_with_pools(program, num_layers, device, case=cases.DONATED, **jit_options):
    """The program, compiled for a donated state -> (statistics, copies of a pool in it)."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    kv_score, ape, kv, score, *rest = (
        None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x in cases.make_operands(case).astuple()
    )
    pools = (kv, score) if num_layers == 1 else [(kv, score)] * num_layers
    function = functools.partial(program, step_of(case, "ffi"))
    compiled = jax.jit(function, **jit_options).lower(kv_score, pools, ape, *rest).compile()
    shape = ",".join(str(size) for size in kv.shape)
    copies = re.findall(rf"= f32\[{shape}\]\S* copy", compiled.as_text())
    return compiled.memory_analysis(), copies, 2 * kv.size * kv.dtype.itemsize


@pytest.mark.parametrize(
    ("program", "num_layers"),
    [(one_call, 1), (two_calls, 1), (scan, 1), (layers, 4)],
)
@pytest.mark.parametrize("case", cases.in_formats([cases.DONATED]), ids=str)
def test_a_donated_state_is_not_copied(case, program, num_layers, device):
    memory, copies, state_bytes = compiled_with_pools(
        program, num_layers, device, case, donate_argnums=1
    )
    assert not copies
    assert memory.alias_size_in_bytes >= num_layers * state_bytes
    assert memory.temp_size_in_bytes < state_bytes / 10


def test_a_state_that_is_kept_is_copied_once(device):
    memory, copies, _ = compiled_with_pools(one_call, 1, device)
    assert len(copies) == 2  # kv and score: what the test above would see
    assert memory.alias_size_in_bytes == 0


@pytest.mark.gpu
def test_a_donated_step_needs_no_more_memory_than_the_state(gpu):
    code = """
import jax, jax.numpy as jnp, jax_dsv4
state = jax_dsv4.init_state(1 << 13, 32, head_dim=512, compress_ratio=128)
operands = jnp.ones((4, 4, 1024), jnp.bfloat16), None, state, jnp.zeros((4, 8), jnp.int32)
step = jax.jit(jax_dsv4.paged_kv_compress, static_argnames="compress_ratio", donate_argnums=2)
kv_comp, state = step(*operands, jnp.arange(4, dtype=jnp.int32), compress_ratio=128)
jax.block_until_ready(kv_comp)
(device,) = kv_comp.devices()
print(device.memory_stats()["peak_bytes_in_use"] / (state.kv.nbytes + state.score.nbytes))
"""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert 1 <= float(run.stdout) <= 1.01


def test_a_donated_state_is_gone(device):
    arrays = arguments(cases.make_operands(cases.MAPPED), device)
    pointers = [arrays[i].unsafe_buffer_pointer() for i in STATE]
    results = donating(step_of(cases.MAPPED, "ffi"))(*arrays)
    assert [results.kv.unsafe_buffer_pointer(), results.score.unsafe_buffer_pointer()] == pointers
    assert all(arrays[i].is_deleted() for i in STATE)
