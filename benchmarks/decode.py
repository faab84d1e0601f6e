"""Time of one ``paged_kv_compress`` call on the GPU at hand, inside a compiled program.

    python benchmarks/decode.py [--geometries] [--baselines] [--reference] [--out results.jsonl]

One program makes many calls in a row on one donated state, each on pages and with tables of its
own, and reads 256 MiB of something else: every call finds its state, and its tables, outside the L2
cache (cold). ``cycle_mib`` says how much is moved between two uses of a page. With ``--layers``
every call has a state of its own, and all share the tables, like the layers of a model: the state
alone is cold. With ``--warm`` all calls are on the same pages and nothing else is read.
``--max-pages`` makes tables as long as those of long contexts.
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
import shutil
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
LAYERS = 96
LAYERS_READ_BYTES = 8 << 30  # takes longer than the dispatch of a program of so many operands
REGIMES = ("all emit", "distributed", "no hit")
FLOATS = ("bfloat16", "float32")


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
    format: str = "raw"
    warm: bool = False
    layers: bool = False
    max_pages: int = 0  # of a table; as many as are used, at least

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
        if self.format == "prefix":
            stored_rows = self.batch  # the row before the step
        for length in map(int, self.kv_lens() if self.format == "raw" else ()):
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


def make_program(point: Point, calls: int, tables, implementation: str, geometry: int):
    """A jitted (states, kv_score, ape, kv_lens, something else to read) -> (states, a few values).

    The states are donated and the results are small: a run finds its buffers where the last one
    did. At other addresses, XLA would have to update its graphs.
    """

    def program(states, kv_score, ape, kv_lens, something_else):
        kept = []
        for i in range(calls):
            layer = i % len(states)
            kv_comp, states[layer] = with_geometry(
                kv_score,
                ape,
                states[layer],
                tables[i % len(tables)],
                kv_lens,
                compress_ratio=point.ratio,
                out_dtype=point.out,
                implementation=implementation,
                geometry=geometry,
            )
            # A custom call is kept by the state it updates; of plain jnp, what nothing reads goes.
            kept = [*kept, jnp.sum(kv_comp)] if implementation == "xla" else []
        return states, sum(kept), jnp.sum(read_all(something_else))

    return jax.jit(program, donate_argnums=0)


def measure(point: Point, implementation: str = "ffi", geometry: int = -1, seconds: float = 0.05):
    """Microseconds per call, median of 5; and bytes moved between two uses of a page."""
    rng = np.random.default_rng(0)
    pages_each = -(-point.last // PAGE_SIZE)
    pages_of_call = point.batch * pages_each
    page_bytes = 2 * PAGE_SIZE * point.state_dim * jnp.dtype(point.state).itemsize
    calls = int(np.clip(COLD_BYTES // point.bytes_moved(), 128, MAX_CALLS))
    read_bytes, num_states = COLD_BYTES, 1
    if implementation == "xla":
        calls = 16  # compiles slowly; its temporaries flush the cache
    num_tables = min(calls, COLD_BYTES // point.bytes_moved() + 1)
    num_pages = max(POOL_BYTES // page_bytes, num_tables * pages_of_call)
    num_tables = min(calls, num_pages // pages_of_call)
    if point.layers:
        calls = num_states = LAYERS
        seconds = 0.2  # the calls are a small part of a run
        read_bytes, num_tables, num_pages = LAYERS_READ_BYTES, 1, pages_of_call
    if point.warm:
        read_bytes, num_tables = 1 << 12, 1

    order = rng.permutation(num_pages)[: num_tables * pages_of_call].astype(np.int32)
    # Constants of the program, a buffer each.
    tables = np.zeros((num_tables, point.batch, max(point.max_pages, pages_each)), np.int32)
    tables[:, :, :pages_each] = order.reshape(num_tables, point.batch, pages_each)
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

    def time_runs(program, count: int) -> float:
        nonlocal states
        start = time.perf_counter()
        for _ in range(count):
            values = None  # its memory is free for the next run's
            states, *values = program(states, *rest)
        jax.block_until_ready((states, values))
        return time.perf_counter() - start

    few = 2
    programs = {}  # with the number of runs to measure
    for n in (calls, calls // 4):
        program = make_program(point, n, tables, implementation, geometry)
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
    of_many, of_few = map(statistics.median, zip(*rounds, strict=True))
    places = num_tables * num_states
    read_between = something_else.nbytes if places == calls else 0
    cycle_bytes = places * point.bytes_moved() + read_between
    return 1e6 * (of_many - of_few) / (calls - calls // 4), cycle_bytes


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


def environment(commit: str | None) -> dict:
    def output(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "device": jax.devices()[0].device_kind,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": output("nvcc", "--version").rpartition("release ")[2].partition(",")[0],
        "jax": jax.__version__,
        "commit": commit or output("git", "rev-parse", "--short", "HEAD"),
        "read_ceiling_gb_s": round(read_ceiling()),
    }


def geometries_of(point: Point) -> list[tuple[int, _config.Geometry]]:
    """With their indices, those of a raw state, the baselines last."""
    shape = (point.head_dim, point.ratio)
    (found,) = (s.geometries for s in _config.SHAPES if (s.head_dim, s.compress_ratio) == shape)
    return list(enumerate(found)) if point.format == "raw" else []


def variants_of(point: Point, args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(name, implementation, geometry) of what is measured side by side."""
    variants = [("default", "ffi", -1)]
    for index, geometry in geometries_of(point):
        if geometry.baseline and args.baselines:
            variants.append((f"row at a time, {geometry.warps} warps", "ffi", index))
        if not geometry.baseline and args.geometries:
            variants.append(("/".join(str(x) for x in geometry[:4]), "ffi", index))
    if args.reference:
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
    add("--state-format", nargs="+", choices=_config.STATE_FORMATS, default=["raw"])
    add("--kv-score", nargs="+", choices=FLOATS, default=["bfloat16"])
    add("--state", nargs="+", choices=FLOATS, default=["float32"])
    add("--max-pages", type=int, nargs="+", default=[0], help="entries of a request's table")
    places = parser.add_mutually_exclusive_group()
    places.add_argument("--layers", action="store_true", help="a state per call, one table for all")
    places.add_argument("--warm", action="store_true", help="all calls on the same pages")
    add("--geometries", action="store_true", help="every compiled geometry, for tuning")
    add("--baselines", action="store_true", help="one row at a time, with 1 and with 4 warps")
    add("--reference", action="store_true", help="the jitted jnp reference, too")
    add("--commit", help="what is measured, where this is no git checkout")
    add("--out", default="/dev/null", help="append JSON lines to this file")
    args = parser.parse_args()

    info = environment(args.commit)
    print(json.dumps(info), flush=True)
    choices = itertools.product(
        args.regime,
        args.batch,
        args.next_n,
        args.ratio,
        args.head_dim,
        args.kv_score,
        args.state,
        ["bfloat16"],
        args.state_format,
        [args.warm],
        [args.layers],
        args.max_pages,
    )
    with open(args.out, "a") as out:
        for point in itertools.starmap(Point, choices):
            cells = []
            for name, implementation, geometry in variants_of(point, args):
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
                f"R {point.ratio}, D {point.head_dim}, next_n {point.next_n}, {point.state} "
                f"{point.format}{', warm' * point.warm}{', layers' * point.layers}"
                f"{f', {point.max_pages} pages' * (point.max_pages > 0)}, "
                f"{point.regime}, B={point.batch}: " + ", ".join(cells),
                flush=True,
            )


if __name__ == "__main__":
    main()
