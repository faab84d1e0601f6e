"""Times of decode steps and of prompts on a CPU, beside jitted jnp and the bandwidth of a copy.

    python benchmarks/cpu.py [--threads 1] [--only ragged] [--out results.jsonl]

A call is timed inside a compiled program: each of its calls is on a layer of its own of one donated
state, as a model's are, and the next run goes on with other layers, of which there are more than a
cache holds; jnp has a state per call. The time per call is the difference between a program of many
calls and one of a quarter of them, over the calls in between; of either the least of many runs
counts, in turns, for other people may be at work on the machine.

The ceiling is the bytes that a call moves (``points.py``) over the bandwidth of NumPy's copy of
large arrays by as many threads, each byte counted as read and as written, measured beside each
figure.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import platform
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import ragged
from environment import describe_environment
from points import PAGE_SIZE, REGIMES, Point

from jax_dsv4 import CompressorState, live, paged_kv_compress

COLD_BYTES = 1 << 30  # of all layers
PROGRAM_BYTES = 128 << 20  # of those that a program's calls are on
MIN_CALLS, MAX_CALLS = 8, 128
VARIANTS = {"default": "ffi", "jnp": "xla"}
DECODE = tuple(
    Point(regime, batch, format=format)
    for format in ("raw", "prefix")
    for regime in REGIMES
    for batch in (1, 8, 64)
) + tuple(
    Point("all emit", batch, ratio=4, overlap=True, format=format)
    for format in ("raw", "prefix")
    for batch in (1, 8, 64)
)
PROMPT_ROWS = 8192


def copy_bandwidth(arrays: list[np.ndarray], seconds: float) -> float:
    """GB/s that are read and written, a thread for each array: the best of some rounds."""
    best = float("inf")
    end = time.perf_counter() + seconds
    with concurrent.futures.ThreadPoolExecutor(len(arrays)) as threads:
        while time.perf_counter() < end:
            start = time.perf_counter()
            list(threads.map(lambda x: np.copyto(x[1], x[0]), arrays))
            best = min(best, time.perf_counter() - start)
    return sum(x.nbytes for x in arrays) / best / 1e9


def measure(point: Point, implementation: str, seconds: float) -> float:
    """Microseconds per call."""
    rng = np.random.default_rng(0)
    num_pages = point.batch * point.pages_each
    layer_bytes = 2 * 4 * num_pages * PAGE_SIZE * point.state_dim
    calls = min(max(PROGRAM_BYTES // layer_bytes, MIN_CALLS), MAX_CALLS)
    num_states, layers = 1, [max(COLD_BYTES // layer_bytes, calls)]
    if implementation == "xla":
        # Copies its state: one each, of no more than a call's pages. It compiles slowly, and what
        # stays in a cache is to its advantage.
        num_states = calls = MIN_CALLS
        layers = []
    some = rng.standard_normal(1 << 20, np.float32)
    shape = (*layers, num_pages, PAGE_SIZE, point.state_dim)
    states = [
        CompressorState(*(jnp.asarray(np.resize(some, shape)) for _ in range(2)), point.format)
        for _ in range(num_states)
    ]
    order = rng.permutation(num_pages).astype(np.int32)
    rest = (
        rng.standard_normal((point.batch, point.next_n, 2 * point.state_dim)).astype(jnp.bfloat16),
        rng.standard_normal((point.ratio, point.state_dim), np.float32),
        order.reshape(point.batch, point.pages_each),
        point.kv_lens(),
    )

    def program(n, states, first_layer, kv_score, ape, tables, kv_lens):
        values = []
        for i in range(n):
            own, states[i % num_states] = paged_kv_compress(
                *(kv_score, ape, states[i % num_states], tables, kv_lens),
                compress_ratio=point.ratio,
                layer=first_layer + i if layers else None,
                implementation=implementation,
            )
            values.append(own)
        return states, values

    rest = jax.device_put(rest)
    few = calls // 4
    programs = {n: jax.jit(partial(program, n), donate_argnums=0) for n in (calls, few)}
    least = dict.fromkeys(programs, float("inf"))
    first_layer = 0
    end = None  # the first round compiles
    while end is None or time.perf_counter() < end:
        for n, run in programs.items():
            if layers and first_layer + n > layers[0]:
                first_layer = 0
            start = time.perf_counter()
            states, values = run(states, first_layer, *rest)
            jax.block_until_ready((states, values))
            if end is not None:
                least[n] = min(least[n], time.perf_counter() - start)
            first_layer += n
        end = end or time.perf_counter() + seconds
    return 1e6 * (least[calls] - least[few]) / (calls - few)


def ragged_bytes(ratio: int, store: str) -> int:
    """Of a prompt: its rows, those that are stored ("live": next to none), and the values."""
    head_dim = ragged.HEAD_DIM
    state_dim = head_dim * (2 if ratio == 4 else 1)
    stored = PROMPT_ROWS * 2 * state_dim * 4 if store == "all" else 0
    return PROMPT_ROWS * 2 * state_dim * 2 + stored + PROMPT_ROWS // ratio * head_dim * 2


def ragged_cases():
    for ratio in (128, 4):
        for format in ("raw", "prefix"):
            for store in ("live", "all"):
                yield {"ratio": ratio, "format": format, "store_rows": store}


def measure_prompt(ratio: int, format: str, store_rows: str, implementation: str) -> float:
    rule = live(max_rewind=3) if store_rows == "live" else "all"
    case = ragged.list_cases(PROMPT_ROWS)["prompt"]
    return ragged.measure(case, ratio, format, rule, implementation, MIN_CALLS)


def describe_cpu() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all")
    add("--only", choices=("decode", "ragged"), help="default: both")
    add("--batch", type=int, nargs="+", help="of decode steps: these only")
    add("--no-jnp", action="store_true", help="the compiled kernel alone")
    add("--seconds", type=float, default=1.0, help="of each figure")
    add("--commit", help="what is measured, where this is no git checkout")
    add("--out", default="/dev/null", help="append JSON lines to this file")
    args = parser.parse_args()
    os.environ["NPROC"] = str(args.threads)  # before XLA makes its threads
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])

    arrays = [np.ones((2, 16 << 20), np.float32) for _ in range(args.threads)]
    info = describe_environment(args.commit) | {"device": describe_cpu(), "threads": args.threads}
    print(json.dumps(info), flush=True)
    variants = dict(list(VARIANTS.items())[: 1 if args.no_jnp else None])
    cases = []  # what is measured, the bytes it moves, and how: implementation -> microseconds
    if args.only != "ragged":
        cases += [
            (
                dataclasses.asdict(point),
                point.bytes_moved(),
                partial(measure, point, seconds=args.seconds),
            )
            for point in DECODE
            if args.batch is None or point.batch in args.batch
        ]
    if args.only != "decode":
        cases += [
            (
                {"case": "prompt", "rows": PROMPT_ROWS, **case},
                ragged_bytes(case["ratio"], case["store_rows"]),
                partial(measure_prompt, **case),
            )
            for case in ragged_cases()
        ]
    with open(args.out, "a") as out:
        for what, num_bytes, measure_case in cases:
            ceiling = copy_bandwidth(arrays, args.seconds / 2)
            cells = [f"a copy {ceiling:.1f} GB/s"]
            for variant, implementation in variants.items():
                us = measure_case(implementation=implementation)
                percent = 100 * num_bytes / us / 1e3 / ceiling
                figures = {"us": round(us, 1), "percent_of_copy_ceiling": round(percent, 1)}
                figures["copy_ceiling_gb_s"] = round(ceiling, 1)
                out.write(json.dumps(what | {"variant": variant} | figures | info) + "\n")
                out.flush()
                cells.append(f"{variant} {us:.1f} us, {percent:.0f} %")
            names = ("case", "regime", "batch", "ratio", "format", "store_rows")
            label = ", ".join(f"{name} {what[name]}" for name in names if name in what)
            print(f"{label}: {'; '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
