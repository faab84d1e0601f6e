"""Time of one ``paged_kv_compress`` call on the GPU at hand, inside a compiled program.

    python benchmarks/decode.py [--points raw prefix] [--geometries] [--out results.jsonl]

The points are those of ``points.csv``, each measured once, and beside some of them the baselines
and the jitted jnp reference.

One program makes many calls in a row on one donated state, each on pages and with tables of its
own, and reads 256 MiB of something else: every call finds its state, and its tables, outside the L2
cache (cold). ``cycle_mib`` says how much is moved between two uses of a page. Where a point says
layers, every call has a state of its own, and all share the tables, like the layers of a model: the
state alone is cold. Where it says warm, all calls are on the same pages and nothing else is read.
The time per call is the difference between this program and one that makes a quarter of the calls
and reads the same, over the calls in between; the two run in turns. Programs are dispatched one
after another, without a wait, and each takes longer than its dispatch. XLA captures the calls in
CUDA graphs by default. ``benchmarks/graph.cu`` checks these figures with graphs captured by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from baseline import WARPS, row_at_a_time
from environment import describe_environment
from points import COLD_BYTES, PAGE_SIZE, Point, add_arguments, select_named

from jax_dsv4 import CompressorState, _config, paged_kv_compress
from jax_dsv4._op import Kernel

LAYERS_READ_BYTES = 8 << 30  # takes longer than the dispatch of a program of so many operands


class Variant(NamedTuple):
    """One of what is measured side by side."""

    name: str
    implementation: str | Kernel  # as paged_kv_compress takes it


DEFAULT = Variant("default", "ffi")
REFERENCE = Variant("jnp", "xla")


def make_program(point: Point, calls: int, tables, variant: Variant):
    """A jitted (states, kv_score, ape, kv_lens, something else to read) -> (states, a few values).

    The states are donated and the results are small: a run finds its buffers where the last one
    did. At other addresses, XLA would have to update its graphs.
    """

    def program(states, kv_score, ape, kv_lens, something_else):
        kept = []
        for i in range(calls):
            layer = i % len(states)
            kv_comp, states[layer] = paged_kv_compress(
                kv_score,
                ape,
                states[layer],
                tables[i % len(tables)],
                kv_lens,
                compress_ratio=point.ratio,
                overlap=point.overlap,
                out_dtype=point.out,
                implementation=variant.implementation,
            )
            # A custom call is kept by the state it updates; of plain jnp, what nothing reads goes.
            kept = [*kept, jnp.sum(kv_comp)] if variant.implementation == "xla" else []
        return states, sum(kept), jnp.sum(read_all(something_else))

    return jax.jit(program, donate_argnums=0)


def measure(point: Point, variant: Variant = DEFAULT, seconds: float = 0.05):
    """Microseconds per call, median of 5; and bytes moved between two uses of a page."""
    rng = np.random.default_rng(0)
    pages_of_call = point.batch * point.pages_each
    # The reference compiles slowly; its temporaries flush the cache.
    calls, num_states, num_tables, num_pages = point.rotation(
        calls=16 if variant.implementation == "xla" else None
    )
    read_bytes = COLD_BYTES
    if point.layers:
        seconds = 0.2  # the calls are a small part of a run
        read_bytes = LAYERS_READ_BYTES
    if point.warm:
        read_bytes = 1 << 12

    order = rng.permutation(num_pages)[: num_tables * pages_of_call].astype(np.int32)
    # Constants of the program, a buffer each.
    tables = np.zeros((num_tables, point.batch, max(point.max_pages, point.pages_each)), np.int32)
    tables[:, :, : point.pages_each] = order.reshape(num_tables, point.batch, point.pages_each)
    keys = iter(jax.random.split(jax.random.key(0), 2 + 2 * num_states))
    kv_score = jax.random.normal(
        next(keys), (point.batch, point.next_n, 2 * point.state_dim), point.kv_score
    )
    ape = jax.random.normal(next(keys), (point.ratio, point.state_dim), jnp.float32)
    shape = (num_pages, PAGE_SIZE, point.state_dim)
    states = [
        CompressorState(
            jax.random.normal(next(keys), shape, point.state),
            jax.random.normal(next(keys), shape, point.state),
            point.format,
        )
        for _ in range(num_states)
    ]
    something_else = jnp.ones(read_bytes // 4, jnp.float32)
    rest = (kv_score, ape, jnp.asarray(point.kv_lens()), something_else)

    def make(n):
        return make_program(point, n, tables, variant)

    (us,) = time_per_call([make], calls, states, rest, seconds)
    places = num_tables * num_states
    read_between = something_else.nbytes if places == calls else 0
    cycle_bytes = places * point.bytes_moved() + read_between
    return us, cycle_bytes


def time_per_call(
    makers: Sequence[Callable[[int], Any]], calls: int, donated: Any, rest: Any, seconds: float
) -> list[float]:
    """Microseconds that a call adds to a program, median of 5, for each maker of programs.

    ``make(n)`` is one of n calls, a jitted (donated, *rest) -> (donated, *a few values). Those of
    ``calls`` and of a quarter of them run for ``seconds`` at a time, all makers' in turns.
    """

    def time_runs(program, count: int) -> float:
        nonlocal donated
        start = time.perf_counter()
        for _ in range(count):
            values = None  # its memory is free for the next run's
            donated, *values = program(donated, *rest)
        jax.block_until_ready((donated, values))
        return time.perf_counter() - start

    few = 2
    programs = {}  # with the number of runs to measure
    for make, n in itertools.product(makers, (calls, calls // 4)):
        program = make(n)
        time_runs(program, few)  # compiles
        once = max((time_runs(program, few + 3) - time_runs(program, few)) / 3, 1e-5)
        programs[program] = few + max(3, int(seconds / once))
    rounds = [
        [
            (time_runs(program, many) - time_runs(program, few)) / (many - few)
            for program, many in programs.items()
        ]
        for _ in range(5)
    ]
    medians = [1e6 * statistics.median(times) for times in zip(*rounds, strict=True)]
    pairs = zip(medians[::2], medians[1::2], strict=True)
    return [(of_many - of_few) / (calls - calls // 4) for of_many, of_few in pairs]


@jax.jit
def read_all(x: jax.Array) -> jax.Array:
    return jnp.sum(x.reshape(-1, 1 << 10), axis=1)


def read_ceiling() -> float:
    """GB/s of one large streaming read (a float32 sum over 4 GiB)."""
    x = jnp.ones(1 << 30, jnp.float32)
    read_all(x).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(10):
            y = read_all(x)
        y.block_until_ready()
        times.append((time.perf_counter() - start) / 10)
    return x.nbytes / min(times) / 1e9


def geometry_variants(point: Point) -> list[Variant]:
    """Every compiled geometry; only raw states have more than one."""
    if point.format != "raw":
        return []
    kind = _config.Kind(point.head_dim, point.ratio, point.overlap)
    return [
        Variant("/".join(map(str, geometry)), Kernel(geometry=index))
        for index, geometry in enumerate(kind.geometries)
    ]


def baseline_variants() -> list[Variant]:
    """The row-at-a-time reduction, by one warp and shared by four."""
    return [Variant(f"row at a time, {warps} warps", row_at_a_time(warps)) for warps in WARPS]


def variants_of(point: Point, beside: frozenset[str], geometries: bool) -> list[Variant]:
    """What is measured side by side."""
    return [
        DEFAULT,
        *(geometry_variants(point) if geometries else []),
        *(baseline_variants() if "baselines" in beside else []),
        *([REFERENCE] if "jnp" in beside else []),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    add = parser.add_argument
    add("--geometries", action="store_true", help="every compiled geometry, too")
    add("--commit", help="what is measured, where this is no git checkout")
    add("--out", default="/dev/null", help="append JSON lines to this file")
    args = parser.parse_args()

    points = select_named(args)
    info = describe_environment(args.commit) | {"read_ceiling_gb_s": round(read_ceiling())}
    print(json.dumps(info), flush=True)
    with open(args.out, "a") as out:
        for point, beside in points.items():
            cells = []
            for variant in variants_of(point, beside, args.geometries):
                us, cycle_bytes = measure(point, variant)
                gb_s = point.bytes_moved() / us / 1e3
                record = dataclasses.asdict(point) | {
                    "variant": variant.name,
                    "us": round(us, 3),
                    "percent_of_read_ceiling": round(100 * gb_s / info["read_ceiling_gb_s"], 1),
                    "cycle_mib": cycle_bytes >> 20,
                }
                out.write(json.dumps(record | info) + "\n")
                out.flush()
                cells.append(f"{variant.name} {us:.2f}")
            print(f"{point}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
