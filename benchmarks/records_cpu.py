"""Time of one ``store_records`` call on the CPU: the kernel beside the jitted jnp reference.

    python benchmarks/records_cpu.py [--counts 16 8192] [--only mxfp4]

Microseconds, each call waited for: the least of many rounds that alternate. ``nowhere``: the kernel
where no value has a slot, which is what a call costs before it computes anything.
"""

from __future__ import annotations

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_dsv4 import init_records, store_records

PAGE_SIZE = 64
CASES = (
    ("f32", 512, {}),
    ("bf16", 512, {}),
    ("fp8", 512, {}),
    ("fp8_ds_mla", 512, {}),
    *(
        (format, head_dim, {"hadamard": hadamard})
        for format in ("fp8_block128", "mxfp4")
        for head_dim in (128, 512)
        for hadamard in (False, True)
    ),
)


def make_run(format, head_dim, options, count, implementation, dtype, nowhere=False):
    """A function that makes one call, and waits for it."""
    rng = np.random.default_rng(0)
    records = init_records(-(-count // PAGE_SIZE), PAGE_SIZE, head_dim=head_dim, format=format)
    slots = np.full(count, -1) if nowhere else rng.permutation(count)
    operands = jax.device_put(
        (
            rng.standard_normal((count, head_dim)).astype(jnp.dtype(dtype)),
            slots.astype(np.int32),
            rng.integers(0, 4096, count).astype(np.int32),
            rng.standard_normal(head_dim).astype(np.float32),
            rng.standard_normal((4096, 64)).astype(np.float32),
        )
    )

    def step(records, values, slots, positions, weight, table):
        return store_records(
            values,
            slots,
            positions,
            records,
            norm_weight=weight,
            cos_sin_cache=table,
            implementation=implementation,
            **options,
        )

    program = jax.jit(step, donate_argnums=0)

    def run():
        nonlocal records
        records = jax.block_until_ready(program(records, *operands))

    return run


def measure(runs: dict, rounds: int, calls: int) -> dict:
    least = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()  # compiles
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(calls):
                start = time.perf_counter()
                run()
                least[name] = min(least[name], time.perf_counter() - start)
    return {name: round(1e6 * seconds, 1) for name, seconds in least.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 8192])
    parser.add_argument("--only", default="", help="formats whose name contains this")
    parser.add_argument("--dtype", default="float32", help="of the values")
    parser.add_argument("--rounding", choices=("none", "once", "model"), help="default: the call's")
    args = parser.parse_args()
    for format, head_dim, options in CASES:
        if args.only not in format:
            continue
        for count in args.counts:
            kind = (format, head_dim, {"rounding": args.rounding, **options}, count)
            runs = {
                "kernel": make_run(*kind, "ffi", args.dtype),
                "jnp": make_run(*kind, "xla", args.dtype),
                "nowhere": make_run(*kind, "ffi", args.dtype, nowhere=True),
            }
            few = count > 1000
            figures = measure(runs, rounds=8 if few else 60, calls=1 if few else 40)
            line = {"format": format, "head_dim": head_dim, **options, "N": count, **figures}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
