"""What a call costs on the host: eager and jitted dispatch, tracing, lowering, compiling.

    python benchmarks/host.py

On a small state, so that the device's work counts for little. Microseconds: of dispatches the least
of 7 rounds, of the others medians.
"""

from __future__ import annotations

import json
import statistics
import time

import jax
import jax.numpy as jnp

from jax_dsv4 import init_state, paged_kv_compress


def make_call():
    return lambda *operands: paged_kv_compress(*operands, compress_ratio=4)


def dispatch(run, count: int) -> float:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(count):
            results = run()
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / count)
    return round(1e6 * min(times), 1)


def median(run, count: int = 20) -> int:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(times))


def main() -> None:
    state = init_state(8, 4, head_dim=128, compress_ratio=4)
    block_tables = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    kv_lens = jnp.array([4, 8], jnp.int32)
    one = (jnp.ones((2, 1, 512)), jnp.ones((4, 256)), state, block_tables, kv_lens)
    rows, ape, *_ = one
    several = (*jax.tree.map(lambda x: jnp.stack([x] * 2), (rows, state)), ape)

    def make_vmap():
        step = make_call()
        return jax.vmap(
            lambda rows, state, ape: step(rows, ape, state, block_tables, kv_lens), (0, 0, None)
        )

    for name, make, operands in (("one", make_call, one), ("vmap", make_vmap, several)):
        call = make()
        jitted = jax.jit(call)
        jax.block_until_ready((call(*operands), jitted(*operands)))
        figures = {
            "eager": dispatch(lambda call=call, x=operands: call(*x), 50),
            "jitted": dispatch(lambda jitted=jitted, x=operands: jitted(*x), 300),
            "trace": median(lambda make=make, x=operands: jax.jit(make()).trace(*x)),
            "lower": median(lambda make=make, x=operands: jax.jit(make()).lower(*x)),
            "compile": median(lambda make=make, x=operands: jax.jit(make()).lower(*x).compile(), 8),
        }
        print(json.dumps({"jax": jax.__version__, "call": name, **figures}), flush=True)


if __name__ == "__main__":
    main()
