"""Time of one ``paged_kv_compress`` call on the GPU at hand, inside a compiled program.

    python benchmarks/decode.py [--geometries] [--reference] [--out results.jsonl]

One program makes many calls in a row on one donated state, each on pages of its own, so that every
call finds its state outside the L2 cache (cold). ``cycle_mib`` says how much is moved between two
uses of a page: calls that move little may stay within an L2, and their figures are warm. A loop
around the calls has a trip count known only at run time; the time per call is the difference
between many trips and few, over the calls in between: no launch from Python and no dispatch of
arguments is in it. The kernels' own launches are; XLA captures the calls in CUDA graphs by default.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_dsv4 import CompressorState, _config
from jax_dsv4.decode import with_geometry

PAGE_SIZE = 32
POOL_BYTES = 1 << 30
COLD_BYTES = 256 << 20  # aimed at between two uses of a page: several times an L2
MAX_CALLS = 512  # in a program, for it to compile in seconds
REGIMES = ("all emit", "distributed", "no hit")


@dataclasses.dataclass(frozen=True)
class Point:
    """What one figure is of."""

    regime: str
    batch: int
    next_n: int = 4
    ratio: int = 128
    head_dim: int = 512
    kv_score: str = "bfloat16"
    state: str = "float32"
    out: str = "bfloat16"

    @property
    def overlap(self) -> bool:
        return _config.overlaps(self.ratio)

    @property
    def state_dim(self) -> int:
        return self.head_dim * (2 if self.overlap else 1)

    @property
    def last(self) -> int:
        """The length at which a window is complete, and the longest of any request."""
        return self.ratio * (2 if self.overlap else 1)

    def kv_lens(self) -> np.ndarray:
        """Lengths in the first window (the second where windows overlap)."""
        request = np.arange(self.batch)
        last = self.last
        match self.regime:
            case "all emit":
                lens = np.full(self.batch, last)
            case "distributed":  # phases next_n apart
                lens = last - self.next_n * (request % max(1, self.ratio // self.next_n))
            case "no hit":
                lens = np.full(self.batch, last - 1)
        return lens.astype(np.int32)

    def bytes_moved(self) -> int:
        """Stored rows read, rows written, and the operands and results that are not state."""
        row = 2 * self.state_dim * jnp.dtype(self.state).itemsize
        stored_rows = 0.0  # in units of a row of S channels: half of one where windows overlap
        for length in map(int, self.kv_lens()):
            first_new = max(length - self.next_n, 0)
            for window in range(first_new // self.ratio, length // self.ratio):
                begin, end = window * self.ratio, (window + 1) * self.ratio
                reduced = max(begin - self.overlap * self.ratio, 0)
                stored_rows += max(min(end, first_new) - reduced, 0) / (1 + self.overlap)
        new_rows = self.batch * self.next_n
        kv_score = new_rows * 2 * self.state_dim * jnp.dtype(self.kv_score).itemsize
        windows = self.batch * -(-self.next_n // self.ratio)
        kv_comp = windows * self.head_dim * jnp.dtype(self.out).itemsize
        return int((stored_rows + new_rows) * row) + kv_score + kv_comp


def make_program(point: Point, calls: int, num_tables: int, implementation: str, geometry: int):
    """A jitted (trips, state, tables, kv_score, ape, kv_lens) -> state; state donated."""

    def trip(_, carry, tables, kv_score, ape, kv_lens):
        state, kept = carry
        for i in range(calls):
            kv_comp, state = with_geometry(
                kv_score,
                ape,
                state,
                tables[i % num_tables],
                kv_lens,
                compress_ratio=point.ratio,
                out_dtype=point.out,
                implementation=implementation,
                geometry=geometry,
            )
            # A custom call is kept by the state it updates; of plain jnp, what nothing reads goes.
            kept = kept + kv_comp if implementation == "xla" else kv_comp
        return state, kept

    def program(state, trips, tables, kv_score, ape, kv_lens):
        shape = (point.batch, -(-point.next_n // point.ratio), point.head_dim)
        carry = (state, jnp.zeros(shape, point.out))
        return jax.lax.fori_loop(
            0, trips, lambda i, c: trip(i, c, tables, kv_score, ape, kv_lens), carry
        )

    return jax.jit(program, donate_argnums=0)


def measure(point: Point, implementation: str = "ffi", geometry: int = -1, seconds: float = 0.03):
    """Microseconds per call, median of 5; and bytes moved between two uses of a page."""
    rng = np.random.default_rng(0)
    pages_each = -(-point.last // PAGE_SIZE)
    page_bytes = 2 * PAGE_SIZE * point.state_dim * jnp.dtype(point.state).itemsize
    num_pages = max(POOL_BYTES // page_bytes, point.batch * pages_each)
    num_tables = num_pages // (point.batch * pages_each)
    calls = int(np.clip(COLD_BYTES // point.bytes_moved(), 64, MAX_CALLS))
    if implementation == "xla":
        calls = 16  # compiles slowly; its temporaries flush the cache
    num_tables = min(num_tables, calls)

    order = rng.permutation(num_pages)[: num_tables * point.batch * pages_each].astype(np.int32)
    tables = [jnp.asarray(t) for t in order.reshape(num_tables, point.batch, pages_each)]
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (num_pages, PAGE_SIZE, point.state_dim)
    state = CompressorState(
        jax.random.normal(keys[0], shape, point.state),
        jax.random.normal(keys[1], shape, point.state),
    )
    kv_score = jax.random.normal(
        keys[2], (point.batch, point.next_n, 2 * point.state_dim), point.kv_score
    )
    ape = jax.random.normal(keys[3], (point.ratio, point.state_dim), jnp.float32)
    kv_lens = jnp.asarray(point.kv_lens())
    rest = (tables, kv_score, ape, kv_lens)
    program = make_program(point, calls, num_tables, implementation, geometry)

    def run(trips):
        nonlocal state
        start = time.perf_counter()
        state, total = program(state, trips, *rest)
        total.block_until_ready()
        return time.perf_counter() - start

    few = 1
    run(few)  # compiles
    run(few)
    once = max((run(few + 3) - run(few)) / 3, 1e-5)
    many = few + max(2, int(seconds / once))
    times = [(run(many) - run(few)) / ((many - few) * calls) for _ in range(5)]
    return statistics.median(times) * 1e6, num_tables * point.bytes_moved()


def read_ceiling() -> float:
    """GB/s of one large streaming read (a float32 sum over 4 GiB)."""
    x = jnp.ones((1 << 20, 1 << 10), jnp.float32)
    total = jax.jit(lambda x: jnp.sum(x, axis=1))
    total(x).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(10):
            y = total(x)
        y.block_until_ready()
        times.append((time.perf_counter() - start) / 10)
    return x.nbytes / min(times) / 1e9


def environment() -> dict:
    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "device": jax.devices()[0].device_kind,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "jax": jax.__version__,
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "read_ceiling_gb_s": round(read_ceiling()),
    }


def variants_of(point: Point, geometries: bool, reference: bool) -> list[tuple[str, str, int]]:
    """(name, implementation, geometry) of what is measured side by side."""
    variants = [("default", "ffi", -1)]
    if geometries:
        shape = (point.head_dim, point.ratio)
        (found,) = (s.geometries for s in _config.SHAPES if (s.head_dim, s.compress_ratio) == shape)
        for index, geometry in enumerate(found):
            name = "/".join(str(int(x)) for x in geometry[:4])
            if geometry.baseline:
                name = f"row at a time, {geometry.warps} warps"
            variants.append((name, "ffi", index))
    if reference:
        variants.append(("jnp", "xla", -1))
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--regime", nargs="+", choices=REGIMES, default=["all emit"])
    add("--batch", type=int, nargs="+", default=[1, 16, 64, 128, 256, 512])
    add("--next-n", type=int, nargs="+", default=[4])
    add("--ratio", type=int, nargs="+", default=[128])
    add("--head-dim", type=int, nargs="+", default=[512])
    add("--geometries", action="store_true", help="every compiled geometry, baselines included")
    add("--reference", action="store_true", help="the jitted jnp reference, too")
    add("--out", default="/dev/null", help="append JSON lines to this file")
    args = parser.parse_args()

    info = environment()
    print(json.dumps(info), flush=True)
    points = itertools.product(args.regime, args.batch, args.next_n, args.ratio, args.head_dim)
    with open(args.out, "a") as out:
        for point in itertools.starmap(Point, points):
            cells = []
            for name, implementation, geometry in variants_of(
                point, args.geometries, args.reference
            ):
                us, cycle_bytes = measure(point, implementation, geometry)
                gb_s = point.bytes_moved() / us / 1e3
                record = dataclasses.asdict(point) | {
                    "variant": name,
                    "us": round(us, 3),
                    "percent_of_read_ceiling": round(100 * gb_s / info["read_ceiling_gb_s"], 1),
                    "cycle_mib": cycle_bytes >> 20,
                }
                out.write(json.dumps(record | info) + "\n")
                cells.append(f"{name} {us:.2f}")
            print(
                f"R {point.ratio}, D {point.head_dim}, next_n {point.next_n}, {point.regime}, "
                f"B={point.batch}: " + ", ".join(cells),
                flush=True,
            )


if __name__ == "__main__":
    main()
