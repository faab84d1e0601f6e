"""Time of one ``ragged_kv_compress`` call on the device at hand, inside a compiled program.

    python benchmarks/ragged.py [--out results.jsonl] [--cases prompt ...] [--rows 8192 ...]

Beside each: the jitted jnp reference of the same call, and for a batch of decode steps
``paged_kv_compress``. ``kv_score`` is bf16, D 512, the state f32, in pages of 64 rows; "live" is
``live(max_rewind=3)``. Calls are those of a model's layers: each has rows of its own, and a layer
of the state. The time per call is the difference between a program of many calls and one of a
quarter of them, over the calls in between; the two run in turns, and on a GPU read 1 GiB of
something else, to take longer than their dispatch. The rows are cold where the calls' are more than
the L2 cache holds, as those of a prompt are. ``benchmarks/ragged.cu`` times launches beside what
reading and writing alone would take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from environment import describe_environment

from jax_dsv4 import init_state, live, paged_kv_compress, ragged_kv_compress

HEAD_DIM, PAGE_SIZE = 512, 64


class Case(NamedTuple):
    """Of each request the length before the call, and its new rows."""

    starts: list[int]
    counts: list[int]
    is_decode: bool = False


def list_cases(rows: int) -> dict[str, Case]:
    """The cases by name; ``rows``: of a prompt."""
    return {
        "prompt": Case([0], [rows]),
        "uneven": Case([0] * 8, [rows // 2, *[rows // 14] * 7]),
        "mixed": Case([1148] * 63 + [4096], [4] * 63 + [2048]),
        "decode": Case([1148] * 64, [4] * 64, is_decode=True),
    }


def measure(
    case: Case, ratio: int, format: str, store_rows: Any, implementation: str, calls: int
) -> float:
    """Microseconds per call: median of 9, on a CPU by the least.

    ``implementation``: "decode" is ``paged_kv_compress``.
    """
    lens = np.add(case.starts, case.counts).astype(np.int32)
    cu = np.cumsum([0, *case.counts]).astype(np.int32)
    max_pages = -(-int(lens.max()) // PAGE_SIZE)
    tables = np.arange(len(lens) * max_pages, dtype=np.int32).reshape(len(lens), max_pages)
    state = init_state(
        tables.size, PAGE_SIZE, head_dim=HEAD_DIM, compress_ratio=ratio, format=format, layers=calls
    )
    width, num_rows = 2 * state.kv.shape[-1], sum(case.counts)
    shape = (len(lens), 4, width) if implementation == "decode" else (num_rows, width)
    keys = jax.random.split(jax.random.key(0), calls)
    rest = (
        [jax.random.normal(key, shape, jnp.bfloat16) for key in keys],
        jnp.zeros((ratio, width // 2)),
        *map(jnp.asarray, (tables, lens, cu)),
        jnp.ones(1 << 28 if jax.default_backend() == "gpu" else 0),
    )

    def program(calls: int, state, rows, ape, tables, lens, cu, something_else):
        values = []
        for i in range(calls):
            common = {"compress_ratio": ratio, "layer": i}
            if implementation == "decode":
                own, state = paged_kv_compress(rows[i], ape, state, tables, lens, **common)
            else:
                common |= {"store_rows": store_rows, "implementation": implementation}
                own, state = ragged_kv_compress(rows[i], ape, state, tables, lens, cu, **common)
            values.append(own)
        return state, values, jnp.sum(something_else)

    def time_runs(run, count: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(count):
            state, *others = run(state, *rest)
        jax.block_until_ready((state, others))
        return time.perf_counter() - start

    jitted = jax.jit(program, static_argnums=0, donate_argnums=1)
    programs = {}
    for n in (calls, max(calls // 4, 1)):
        run = jax.tree_util.Partial(jitted, n)
        time_runs(run, 2)  # compiles
        programs[n] = run, max(2, int(0.02 / (time_runs(run, 2) / 2)))
    rounds = [[time_runs(run, count) / count for run, count in programs.values()] for _ in range(9)]
    if jax.default_backend() == "cpu":  # of which others may have a part
        difference = min(many for many, _ in rounds) - min(few for _, few in rounds)
    else:
        difference = statistics.median(many - few for many, few in rounds)
    return 1e6 * difference / (calls - max(calls // 4, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list_cases(1), default=list(list_cases(1)))
    parser.add_argument("--rows", nargs="+", type=int, default=[8192, 65536], help="of prompts")
    parser.add_argument("--ratios", nargs="+", type=int, default=[128, 4])
    parser.add_argument("--formats", nargs="+", default=["raw", "prefix"])
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    parser.add_argument("--out", default="/dev/null", help="append JSON lines to this file")
    args = parser.parse_args()
    environment = describe_environment(args.commit)
    print(json.dumps(environment), flush=True)
    points = [
        (name, rows if name in ("prompt", "uneven") else args.rows[0], ratio, format, store)
        for name in args.cases
        for rows in (args.rows if name == "prompt" else args.rows[:1])
        for ratio in args.ratios
        for format in args.formats
        for store in (("live", "all") if name == "prompt" else ("live",))
    ]
    for name, rows, ratio, format, store in points:
        case = list_cases(rows)[name]
        store_rows = live(max_rewind=3) if store == "live" else "all"
        result = {"case": name, "rows": sum(case.counts), "requests": len(case.counts)}
        result |= {"ratio": ratio, "format": format, "store_rows": store}
        for implementation, calls in (("ffi", 16), ("xla", 4), *[("decode", 16)] * case.is_decode):
            calls = max(2, calls // 4) if rows > 10_000 else calls
            us = measure(case, ratio, format, store_rows, implementation, calls)
            result[{"ffi": "us", "xla": "jnp_us", "decode": "decode_us"}[implementation]] = round(
                us, 2
            )
        print(json.dumps(result), flush=True)
        with open(args.out, "a") as file:
            file.write(json.dumps(result | environment) + "\n")


if __name__ == "__main__":
    main()
