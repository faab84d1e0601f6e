"""A decode step of many compressor calls on several devices, against the same on one.

    python benchmarks/data_parallel.py [--devices 2]

Every device has a group of requests with pools of its own. On meshes of Auto and of Explicit axes,
and in shard_map: states equal to one device's and values within a bf16 ulp, no collective in the
compiled program, and the time per step against one device with one group.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_dsv4 import CompressorState, paged_kv_compress

COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
BATCH, NEXT_N, PAGE_SIZE = 64, 4, 32  # per device
RATIOS = (4, 128) * 10  # of the layers


def make_operands(group: int):
    """One group's (states, kv_scores, block tables, kv_lens), states and kv_scores by layer."""
    rng = np.random.default_rng(group)
    pages = 128 // PAGE_SIZE
    states, kv_scores = [], []
    for ratio in RATIOS:
        state_dim = 1024 if ratio == 4 else 512
        row = rng.standard_normal(state_dim, np.float32)
        rows = rng.standard_normal((BATCH * pages, PAGE_SIZE, 1), np.float32)
        states.append(CompressorState(rows * row, rows - row))
        kv_scores.append(rng.standard_normal((BATCH, NEXT_N, 2 * state_dim), np.float32))
    kv_scores = [x.astype(jnp.bfloat16) for x in kv_scores]
    tables = rng.permutation(BATCH * pages).reshape(BATCH, pages).astype(np.int32)
    return states, kv_scores, tables, np.full(BATCH, 128, np.int32)


def step(states, kv_scores, tables, kv_lens):
    results = [
        paged_kv_compress(kv_score, None, state, tables, kv_lens, compress_ratio=ratio)
        for ratio, state, kv_score in zip(RATIOS, states, kv_scores, strict=True)
    ]
    return [state for _, state in results], [kv_comp for kv_comp, _ in results]


def steps(trips, states, *rest, run):
    """``trips`` steps in one program -> (states, last values)."""
    kv_comps = jax.eval_shape(run, states, *rest)[1]
    empty = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, device=getattr(x, "sharding", None)), kv_comps
    )
    return jax.lax.fori_loop(0, trips, lambda _, c: run(c[0], *rest), (states, empty))


def microseconds_per_step(run, operands):
    program = jax.jit(functools.partial(steps, run=run), donate_argnums=1)
    states, *rest = operands

    def timed(trips):
        nonlocal states
        start = time.perf_counter()
        states, kv_comps = program(trips, states, *rest)
        jax.block_until_ready(kv_comps)
        return time.perf_counter() - start

    timed(1), timed(1)
    return statistics.median((timed(205) - timed(5)) / 200 for _ in range(9)) * 1e6


def compare(name, run, operands, expected, baseline_us):
    compiled = jax.jit(run, donate_argnums=0).lower(*operands).compile()
    collectives = sorted(set(COLLECTIVE.findall(compiled.as_text())))
    got = jax.tree.map(np.asarray, jax.jit(run)(*operands))
    (states, kv_comps), (expected_states, expected_kv_comps) = got, expected
    equal = all(map(np.array_equal, jax.tree.leaves(states), jax.tree.leaves(expected_states)))
    for value, other in zip(kv_comps, expected_kv_comps, strict=True):
        # One device has twice the requests, hence maybe another geometry, and order of its sums.
        a, b = value.astype(np.float32), other.astype(np.float32)
        equal &= bool(np.all(np.abs(a - b) <= np.maximum(2.0**-7 * np.abs(b), 1e-6)))
    us = microseconds_per_step(run, operands)
    print(
        f"{name}: equal to one device: {equal}; collectives: {collectives or 'none'}; "
        f"{us:.1f} us per step, {us / baseline_us:.3f} of one device's",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2)
    count = parser.parse_args().devices
    devices = jax.devices()[:count]
    assert len(devices) == count, f"JAX has {len(devices)} devices"
    groups = [make_operands(group) for group in range(count)]
    one = jax.tree.map(lambda x: x[None], groups[0])
    every = jax.tree.map(lambda *xs: np.stack(xs), *groups)
    run = jax.vmap(step)

    print(f"{count} x {devices[0].device_kind}, jax {jax.__version__}")
    print(f"{len(RATIOS)} calls per step, batch {BATCH} per device, next_n {NEXT_N}, all emit")
    expected = jax.tree.map(np.asarray, jax.jit(run)(*jax.device_put(every, devices[0])))
    baseline = microseconds_per_step(run, jax.device_put(one, devices[0]))
    print(f"one device, one group: {baseline:.1f} us per step", flush=True)
    for axis_type in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((count,), ("data",), axis_types=(axis_type,), devices=devices)
        put = jax.device_put(every, NamedSharding(mesh, P("data")))
        with jax.set_mesh(mesh):
            compare(f"{axis_type.name} mesh", run, put, expected, baseline)
            mapped = jax.shard_map(run, in_specs=P("data"), out_specs=P("data"))
            put = jax.device_put(every, NamedSharding(mesh, P("data")))
            compare(f"shard_map, {axis_type.name} mesh", mapped, put, expected, baseline)


if __name__ == "__main__":
    main()
