"""Time of a whole decode step of DeepSeek-V4-Flash, all its compressor calls in one program.

    python benchmarks/step.py [--out step.jsonl] [--calls fused] [--records bf16] [--layouts list]
        [--formats prefix] [--batch 16]

Per layer a CSA compressor and its indexer's, and the HCA compressor, while there are some;
``next_n`` 4, ``kv_score`` bf16, state f32, pages of 32 rows. Phases are ``next_n`` apart: R 4
completes a window in every request, R 128 in one of 32. The layers of a kind share their tables,
lengths, weights and ``kv_score``: an operand per layer would add to the dispatch, and slices of a
stacked one are kernels of their own, where an engine's projections come out of the program itself.
Nothing is computed beside the calls, so a small step finds more of its state in the L2 cache than
one with weights between the calls would.

Calls:

- "values": 62 of ``paged_kv_compress``. Nothing is done with the values.
- "jnp": the same, and behind each RMSNorm, RoPE and the storing of the records in plain jnp.
- "fused": 41 of ``decode_records``: CSA and indexer together, with one ``kv_score`` for both.

Records, 64 to a page, of which a request has one if it completes a window: "bf16"; or "fp8", which
is fp8_ds_mla, and for the indexer fp8_block128 behind a Hadamard transform. Those that "jnp" stores
in bf16 are rows of an array of bf16, as plain jnp would have them; in fp8 they are what
``store_records`` writes.

Layouts of the state: "list", a ``CompressorState`` per layer; "layers", one per kind, of arrays
``[layers, num_pages, page_size, S]``. Records are measured with "layers" alone, and are in one
array per kind, too. All are donated.

Three times, in microseconds:

- step: programs of one step dispatched back to back, with a wait at the end of all; by the number
  of programs.
- dispatch: what the host spends on a program: the median over single calls, in short bursts that
  are not waited for. A long row of programs would fill the launch queue, and the calls would then
  wait for the device; the first calls after a wait are slower than those in a row, and left out.
- GPU: what one more step adds to a program, from programs of 9 steps (of "jnp" 3, which compile for
  long) and of 1, back to back. Too little where a program of 1 step is bound by its dispatch: by at
  most (step - GPU) / 8, or / 2. It means nothing where the longer one is, too.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from environment import describe_environment

from jax_dsv4 import (
    CacheTables,
    Compressor,
    CompressorCache,
    CompressorState,
    completed_windows,
    decode_records,
    init_records,
    live_pages,
    make_cos_sin_cache,
    paged_kv_compress,
    pages_needed,
    store_records,
)
from jax_dsv4.reference.records import normalize, rotate


class Kind(NamedTuple):
    """The layers of one kind."""

    name: str
    head_dim: int
    ratio: int
    layers: int

    @property
    def state_dim(self) -> int:
        return self.head_dim * (2 if self.ratio == 4 else 1)


KINDS = (Kind("CSA", 512, 4, 21), Kind("indexer", 128, 4, 21), Kind("HCA", 512, 128, 20))
FUSED = (KINDS[:2], KINDS[2:])  # those that one call serves
CALLS, LAYOUTS, FORMATS = ("values", "jnp", "fused"), ("list", "layers"), ("raw", "prefix")
RECORDS = {
    "bf16": {"CSA": "bf16", "indexer": "bf16", "HCA": "bf16"},
    "fp8": {"CSA": "fp8_ds_mla", "indexer": "fp8_block128", "HCA": "fp8_ds_mla"},
}
NEXT_N, PAGE_SIZE, RECORD_PAGE_SIZE, LAST = 4, 32, 64, 256  # the longest length
ROPE = {"qk_rope_head_dim": 64, "compress_rope_theta": 160000}
MANY_STEPS = {"values": 9, "jnp": 3, "fused": 9}
BURST, BURSTS, FIRST_CALLS = 16, 40, 4
ROUNDS = 7


class Point(NamedTuple):
    """What the figures are of. The field names are keys of the records in the JSON lines."""

    format: str
    batch: int
    layout: str
    variant: str  # one of CALLS
    records: str | None


class Inputs(NamedTuple):
    """What a step reads, by the name of the kind where kinds differ."""

    kv_score: dict[str, jax.Array]  # [B, next_n, 2 S]; fused: of all kinds of a call, by the first
    ape: dict[str, jax.Array]  # [R, S]
    norm_weight: dict[str, jax.Array]  # [D]
    tables: dict[str, jax.Array]  # [B, max_pages]
    record_tables: dict[str, jax.Array]  # [B, max_record_pages]
    cos_sin_cache: jax.Array  # [LAST, 64]
    kv_lens: jax.Array  # [B]


def make_lengths(batch: int) -> np.ndarray:
    """Multiples of next_n, of every phase of R 128."""
    phases = max(kind.ratio for kind in KINDS) // NEXT_N
    return (LAST - NEXT_N * (np.arange(batch) % phases)).astype(np.int32)


def make_table(kind: Kind, batch: int, format: str) -> tuple[np.ndarray, int]:
    """Only the pages that the step needs, well mixed, and how many the pool has."""
    options = {"compress_ratio": kind.ratio, "next_n": NEXT_N, "format": format}
    num_pages = batch * pages_needed(PAGE_SIZE, **options)
    free = iter(np.random.default_rng(0).permutation(num_pages))
    table = np.full((batch, LAST // PAGE_SIZE), -1, np.int32)
    for request, length in enumerate(make_lengths(batch)):
        for page in live_pages(int(length) - NEXT_N, PAGE_SIZE, **options):
            table[request, page] = next(free)
    return table, num_pages


def make_record_table(kind: Kind, batch: int) -> tuple[np.ndarray, int]:
    """The same for records. A step completes no more than one window of a request."""
    options = {"compress_ratio": kind.ratio, "next_n": NEXT_N}
    with jax.ensure_compile_time_eval():  # also where only shapes are asked for
        (windows,) = np.asarray(completed_windows(make_lengths(batch), **options).window).T
    (requests,) = np.nonzero(windows >= 0)
    table = np.full((batch, -(-LAST // kind.ratio // RECORD_PAGE_SIZE)), -1, np.int32)
    pages = np.random.default_rng(0).permutation(len(requests))
    table[requests, windows[requests] // RECORD_PAGE_SIZE] = pages
    return table, len(requests)


def make_operands(point: Point) -> tuple[dict[str, Any], Inputs]:
    """(the states and records by kind, the rest)."""
    keys = iter(jax.random.split(jax.random.key(0), 256))
    rope = jnp.asarray(make_cos_sin_cache(ROPE, LAST))
    inputs = Inputs({}, {}, {}, {}, {}, rope, jnp.asarray(make_lengths(point.batch)))
    caches = {}
    for kind in KINDS:
        table, num_pages = make_table(kind, point.batch, point.format)
        record_table, num_record_pages = make_record_table(kind, point.batch)
        S = kind.state_dim
        new_rows = jax.random.normal(next(keys), (point.batch, NEXT_N, 2 * S), jnp.bfloat16)
        inputs.kv_score[kind.name] = new_rows
        inputs.ape[kind.name] = jax.random.normal(next(keys), (kind.ratio, S), jnp.float32)
        inputs.norm_weight[kind.name] = jax.random.uniform(next(keys), (kind.head_dim,))
        inputs.tables[kind.name] = jnp.asarray(table)
        inputs.record_tables[kind.name] = jnp.asarray(record_table)
        shape = (num_pages, PAGE_SIZE, S)
        if point.layout == "layers":
            shape = (kind.layers, *shape)
        made = [
            CompressorState(*(jax.random.normal(next(keys), shape) for _ in range(2)), point.format)
            for _ in range(1 if point.layout == "layers" else kind.layers)
        ]
        states = made[0] if point.layout == "layers" else made
        caches[kind.name] = states, make_records(kind, point, num_record_pages)
    if point.variant == "fused":
        for first, *others in FUSED:
            rows = [inputs.kv_score[kind.name] for kind in (first, *others)]
            inputs.kv_score[first.name] = jnp.concatenate(rows, axis=-1)
    return caches, inputs


def make_records(kind: Kind, point: Point, num_pages: int) -> Any:
    """Of all layers: a ``RecordCache``, or rows of bf16."""
    if point.records is None:
        return None
    if point.variant == "jnp" and point.records == "bf16":
        return jnp.zeros((kind.layers, num_pages * RECORD_PAGE_SIZE, kind.head_dim), jnp.bfloat16)
    format = RECORDS[point.records][kind.name]
    size = {"head_dim": kind.head_dim, "layers": kind.layers}
    return init_records(num_pages, RECORD_PAGE_SIZE, **size, format=format)


def call_one(kind: Kind, layer: int, cache: Any, inputs: Inputs) -> Any:
    """The kind's cache after a call that ends in values, and what jnp makes of them."""
    states, records = cache
    operands = inputs.kv_score[kind.name], inputs.ape[kind.name]
    tables = inputs.tables[kind.name], inputs.kv_lens
    options = {"compress_ratio": kind.ratio}
    if isinstance(states, list):
        _, state = paged_kv_compress(*operands, states[layer], *tables, **options)
        return [*states[:layer], state, *states[layer + 1 :]], records
    if records is None:
        return paged_kv_compress(*operands, states, *tables, **options, layer=layer)[1], records
    options |= {"out_dtype": jnp.float32}  # as decode_records rounds
    values, states = paged_kv_compress(*operands, states, *tables, **options, layer=layer)
    return states, store_by_jnp(kind, layer, values, records, inputs)


def store_by_jnp(kind: Kind, layer: int, values: jax.Array, records: Any, inputs: Inputs) -> Any:
    windows = completed_windows(inputs.kv_lens, compress_ratio=kind.ratio, next_n=NEXT_N)
    page = jnp.take_along_axis(
        inputs.record_tables[kind.name], windows.window // RECORD_PAGE_SIZE, axis=1, mode="fill"
    )
    slots = page * RECORD_PAGE_SIZE + windows.window % RECORD_PAGE_SIZE
    slots = jnp.where(windows.valid & (page >= 0), slots, 2**31 - 1).reshape(-1)  # nowhere
    values, positions = values.reshape(-1, kind.head_dim), windows.position.reshape(-1)
    weight, table = inputs.norm_weight[kind.name], inputs.cos_sin_cache
    if isinstance(records, jax.Array):
        made = rotate(normalize(values, weight, 1e-6), positions, table, "halves")
        return records.at[layer, slots].set(made.astype(records.dtype), mode="drop")
    return store_records(
        *(values, slots, positions, records),
        norm_weight=weight,
        cos_sin_cache=table,
        hadamard=records.format == "fp8_block128",
        layer=layer,
        implementation="xla",
    )


def call_fused(kinds: tuple[Kind, ...], layer: int, caches: list[Any], inputs: Inputs) -> list[Any]:
    """The caches of these kinds after one call."""
    compressors = tuple(
        Compressor(
            *(inputs.ape[kind.name], inputs.norm_weight[kind.name], inputs.cos_sin_cache),
            head_dim=kind.head_dim,
            compress_ratio=kind.ratio,
            hadamard=records.format == "fp8_block128",
        )
        for kind, (_, records) in zip(kinds, caches, strict=True)
    )
    stepped = decode_records(
        inputs.kv_score[kinds[0].name],
        compressors,
        tuple(CompressorCache(*cache) for cache in caches),
        tuple(CacheTables(inputs.tables[k.name], inputs.record_tables[k.name]) for k in kinds),
        inputs.kv_lens,
        layer=layer,
    )
    return [(cache.state, cache.records) for cache in stepped]


def make_program(steps: int, variant: str) -> Callable[..., Any]:
    """A jitted (caches, inputs) -> caches."""

    def program(caches, inputs):
        caches = dict(caches)
        for _, layer in itertools.product(range(steps), range(max(k.layers for k in KINDS))):
            for kinds in FUSED:
                if layer >= kinds[0].layers:
                    continue
                own = [caches[kind.name] for kind in kinds]
                if variant == "fused":
                    own = call_fused(kinds, layer, own, inputs)
                else:
                    own = [call_one(k, layer, x, inputs) for k, x in zip(kinds, own, strict=True)]
                caches |= {kind.name: cache for kind, cache in zip(kinds, own, strict=True)}
        return caches

    return jax.jit(program, donate_argnums=0)


def compile_ahead(points: Sequence[Point], folder: str) -> None:
    """Compile the programs of all points, side by side, into JAX's cache of programs."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    def compile(point: Point, steps: int) -> None:
        operands = jax.eval_shape(partial(make_operands, point))
        make_program(steps, point.variant).lower(*operands).compile()

    with concurrent.futures.ThreadPoolExecutor() as threads:
        started = [
            threads.submit(compile, point, steps)
            for point in points
            for steps in (MANY_STEPS[point.variant], 1)
        ]
        for future in started:
            future.result()


def measure(point: Point, runs: int) -> dict[str, float]:
    """Microseconds: medians."""
    caches, inputs = jax.block_until_ready(make_operands(point))

    def time_back_to_back(program, count: int) -> float:
        nonlocal caches
        start = time.perf_counter()
        for _ in range(count):
            caches = program(caches, inputs)
        jax.block_until_ready(caches)
        return (time.perf_counter() - start) / count

    def time_single_calls(program) -> list[float]:
        nonlocal caches
        times = [time.perf_counter()]
        for _ in range(BURST):
            caches = program(caches, inputs)
            times.append(time.perf_counter())
        jax.block_until_ready(caches)
        return list(np.diff(times)[FIRST_CALLS:])

    many_steps = MANY_STEPS[point.variant]
    one, many = (make_program(steps, point.variant) for steps in (1, many_steps))
    counts = {one: runs, many: max(1, runs // many_steps)}
    for program in counts:
        time_back_to_back(program, 3)  # compiles, and captures graphs
    # In turns: a clock that drifts shifts both.
    rounds = [[time_back_to_back(*item) for item in counts.items()] for _ in range(ROUNDS)]
    of_one, of_many = (1e6 * statistics.median(times) for times in zip(*rounds, strict=True))
    bursts = [time_single_calls(one) for _ in range(BURSTS)]
    dispatch = 1e6 * statistics.median(itertools.chain(*bursts))
    return {
        "step_us": round(of_one, 1),
        "dispatch_us": round(dispatch, 1),
        "gpu_us": round((of_many - of_one) / (many_steps - 1), 1),
        "many_us": round(of_many, 1),
        "many_steps": many_steps,
    }


def list_points(args: argparse.Namespace) -> Iterator[Point]:
    for format, batch in itertools.product(args.formats, args.batch):
        for variant, layout in itertools.product(args.calls, args.layouts):
            if variant == "values":
                yield Point(format, batch, layout, variant, None)
            elif layout == "layers":
                for records in args.records:
                    yield Point(format, batch, layout, variant, records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--calls", nargs="+", choices=CALLS, default=CALLS)
    add("--records", nargs="+", choices=RECORDS, default=list(RECORDS))
    add("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    add("--batch", type=int, nargs="+", default=[16, 256])
    add("--runs", type=int, default=300, help="programs of one step in a row")
    add("--commit", help="what is measured, where this is no git checkout")
    add("--out", default="/dev/null", help="append JSON lines to this file")
    args = parser.parse_args()

    info = describe_environment(args.commit)
    print(f"{info['device']}, jax {info['jax']}, commit {info['commit']}")
    print(f"next_n {NEXT_N}, state f32; us, medians of {ROUNDS} rounds")
    titles = "format", "B", "layout", "calls", "records", "step", "dispatch", "GPU"
    line = "{:8} {:>4} {:8} {:9} {:8} {:>9} {:>9} {:>9}"
    print(line.format(*titles), flush=True)
    points = list(list_points(args))
    with open(args.out, "a") as out, tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        compile_ahead(points, folder)
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
        for point in points:
            calls = sum(kinds[0].layers for kinds in FUSED)
            if point.variant != "fused":
                calls = sum(kind.layers for kind in KINDS)
            result = measure(point, args.runs)
            out.write(json.dumps(point._asdict() | {"calls": calls} | result | info) + "\n")
            out.flush()
            what = point.format, point.batch, point.layout, f"{calls} {point.variant}"
            times = (f"{result[key]:.1f}" for key in ("step_us", "dispatch_us", "gpu_us"))
            print(line.format(*what, point.records or "-", *times), flush=True)


if __name__ == "__main__":
    main()
