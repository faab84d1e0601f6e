"""Time of one ``store_records`` call on the GPU at hand, inside a compiled program.

    python benchmarks/records.py [--out results.jsonl]

Calls are those of a model's layers: each has values of its own, and a layer of the cache; all share
slots, positions, weight and table. A program reads 1 GiB of something else, so that no value and no
page is in the L2 cache, and that it takes longer than its dispatch. The time per call is the
difference between a program of many calls and one of a quarter of them, over the calls in between;
the two run in turns. In ``benchmarks/records.cu`` slots, positions and the table's rows are cold,
too.
Beside each: the jitted jnp reference, and the time that its bytes take at the rate of one large
copy in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from environment import describe_environment

from jax_dsv4 import init_records, store_records

FORMATS = (
    ("f32", 512, {}),
    ("bf16", 512, {}),
    ("fp8", 512, {}),
    ("fp8_ds_mla", 512, {}),
    ("fp8_block128", 128, {"hadamard": True}),
    ("mxfp4", 128, {"hadamard": True}),
)
COUNTS = (1, 16, 64, 256, 8192)
PAGE_SIZE = 64
NUM_POSITIONS = 1 << 16
COLD_BYTES = 1 << 30


def make_program(calls: int, implementation: str, options: dict):
    def program(records, values, slots, positions, weight, table, something_else):
        for i in range(calls):
            records = store_records(
                values[i],
                slots,
                positions,
                records,
                norm_weight=weight,
                cos_sin_cache=table,
                layer=i,
                implementation=implementation,
                **options,
            )
        return records, jnp.sum(something_else)

    return jax.jit(program, donate_argnums=0)


def measure(format: str, head_dim: int, options: dict, count: int, implementation: str) -> float:
    """Microseconds per call, median of 15."""
    rng = np.random.default_rng(0)
    is_prompt = count > 1000  # whose rows lie side by side, where a decode step's lie anywhere
    calls = 16 if is_prompt else 32 if implementation == "xla" else 64
    num_slots = max(count, 1 << 12)
    records = init_records(
        num_slots // PAGE_SIZE, PAGE_SIZE, head_dim=head_dim, format=format, layers=calls
    )
    slots, positions = np.arange(count), 4 * np.arange(count)
    if not is_prompt:
        slots = rng.permutation(num_slots)[:count]
        positions = rng.integers(0, NUM_POSITIONS, count)
    keys = iter(jax.random.split(jax.random.key(0), calls + 2))
    rest = (
        [jax.random.normal(next(keys), (count, head_dim)) for _ in range(calls)],
        jnp.asarray(slots, jnp.int32),
        jnp.asarray(positions, jnp.int32),
        jax.random.normal(next(keys), (head_dim,)),
        jax.random.normal(next(keys), (NUM_POSITIONS, 64)),
        jnp.ones(COLD_BYTES // 4, jnp.float32),
    )

    def time_runs(program, runs: int) -> float:
        nonlocal records
        start = time.perf_counter()
        for _ in range(runs):
            records, total = program(records, *rest)
        jax.block_until_ready((records, total))
        return time.perf_counter() - start

    programs = {}
    for n in (calls, calls // 4):
        program = make_program(n, implementation, options)
        time_runs(program, 3)  # compiles
        programs[program] = max(4, int(0.03 / (time_runs(program, 3) / 3)))
    rounds = [
        [time_runs(program, runs) / runs for program, runs in programs.items()] for _ in range(15)
    ]
    difference = statistics.median(many - few for many, few in rounds)
    return 1e6 * difference / (calls - calls // 4)


def copy_rate() -> float:
    """GB/s, read and written, of one large copy."""
    x = jnp.ones(1 << 28, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            y = copy(x)
        y.block_until_ready()
        times.append((time.perf_counter() - start) / 10)
    return 2 * x.nbytes / min(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    parser.add_argument("--formats", nargs="+", default=[name for name, *_ in FORMATS])
    parser.add_argument("--out", default="/dev/null", help="append JSON lines to this file")
    args = parser.parse_args()
    rate = copy_rate()
    environment = describe_environment(args.commit)
    with open(args.out, "a") as out:
        print(json.dumps(environment | {"copy_gb_s": round(rate)}), flush=True)
        for format, head_dim, options in FORMATS:
            if format not in args.formats:
                continue
            row_bytes = init_records(1, 1, head_dim=head_dim, format=format)._kind
            for count in COUNTS:
                moved = count * (4 * head_dim + 256 + row_bytes.data_bytes + row_bytes.scale_bytes)
                figures = {
                    name: round(measure(format, head_dim, options, count, implementation), 2)
                    for name, implementation in (("kernel", "ffi"), ("jnp", "xla"))
                }
                line = {
                    "format": format,
                    "N": count,
                    **figures,
                    "bytes": round(moved / rate / 1e3, 2),
                }
                print(json.dumps(line), flush=True)
                out.write(json.dumps(environment | line) + "\n")


if __name__ == "__main__":
    main()
