"""Time of a whole decode step of DeepSeek-V4-Flash: its 62 compressor calls in one program.

    python benchmarks/step.py [--out step.jsonl] [--layouts list] [--formats prefix] [--batch 16]

Per layer a call of the CSA compressor, of the indexer's and of the HCA compressor, while there are
some; ``next_n`` 4, ``kv_score`` bf16, state f32, pages of 32 rows. Phases are ``next_n`` apart: R 4
completes a window in every request, R 128 in one of 32. The layers of a kind share their tables,
lengths, ``ape`` and ``kv_score``: an operand per layer would add to the dispatch, and slices of a
stacked one are kernels of their own, where an engine's projections come out of the program itself.
Nothing is computed beside the calls, so a small step finds more of its state in the L2 cache than
one with weights between the calls would.

Layouts of the state: "list", a ``CompressorState`` per layer; "layers", one per kind, of arrays
``[layers, num_pages, page_size, S]``. Either is donated. "list" uses nothing that earlier versions
of the package lack, so this script measures them, too.

Three times, in microseconds:

- step: programs of one step dispatched back to back, with a wait at the end of all; by the number
  of programs.
- dispatch: what the host spends on a program: the median over single calls, in short bursts that
  are not waited for. A long row of programs would fill the launch queue, and the calls would then
  wait for the device; the first calls after a wait are slower than those in a row, and left out.
- GPU: what one more step adds to a program, from programs of 9 steps and of 1, back to back. Too
  little where a program of 1 step is bound by its dispatch: by at most (step - GPU) / 8. It means
  nothing where that of 9 is, too. ``nine_us`` in the records is the program of 9 steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from environment import describe_environment

from jax_dsv4 import CompressorState, live_pages, paged_kv_compress, pages_needed


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
NEXT_N, PAGE_SIZE, LAST = 4, 32, 256  # the longest length
LAYOUTS, FORMATS = ("list", "layers"), ("raw", "prefix")
MANY_STEPS = 9
BURST, BURSTS, FIRST_CALLS = 16, 40, 4
ROUNDS = 7


class Inputs(NamedTuple):
    """What a step reads, by the name of the kind where kinds differ."""

    kv_score: dict[str, jax.Array]  # [B, next_n, 2 S]
    ape: dict[str, jax.Array]  # [R, S]
    tables: dict[str, jax.Array]  # [B, max_pages]
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


def make_operands(batch: int, format: str, layout: str) -> tuple[dict[str, Any], Inputs]:
    """(the states by kind, the rest)."""
    keys = iter(jax.random.split(jax.random.key(0), 256))
    inputs = Inputs({}, {}, {}, jnp.asarray(make_lengths(batch)))
    states = {}
    for kind in KINDS:
        table, num_pages = make_table(kind, batch, format)
        S = kind.state_dim
        new_rows = jax.random.normal(next(keys), (batch, NEXT_N, 2 * S), jnp.bfloat16)
        inputs.kv_score[kind.name] = new_rows
        inputs.ape[kind.name] = jax.random.normal(next(keys), (kind.ratio, S), jnp.float32)
        inputs.tables[kind.name] = jnp.asarray(table)
        shape = (num_pages, PAGE_SIZE, S)
        if layout == "layers":
            shape = (kind.layers, *shape)
        made = [
            CompressorState(*(jax.random.normal(next(keys), shape) for _ in range(2)), format)
            for _ in range(1 if layout == "layers" else kind.layers)
        ]
        states[kind.name] = made[0] if layout == "layers" else made
    return states, inputs


def make_program(steps: int, layout: str) -> Callable[..., Any]:
    """A jitted (states, inputs) -> states."""

    def call(kind, layer, states, inputs):
        """The kind's states after the call of this layer."""
        new_rows, ape, table = (x[kind.name] for x in inputs[:3])
        if layout == "layers":
            where = {"compress_ratio": kind.ratio, "layer": layer}
            return paged_kv_compress(new_rows, ape, states, table, inputs.kv_lens, **where)[1]
        _, state = paged_kv_compress(
            new_rows, ape, states[layer], table, inputs.kv_lens, compress_ratio=kind.ratio
        )
        return [*states[:layer], state, *states[layer + 1 :]]

    def program(states, inputs):
        states = dict(states)
        for _ in range(steps):
            for layer in range(max(kind.layers for kind in KINDS)):
                for kind in KINDS:
                    if layer < kind.layers:
                        states[kind.name] = call(kind, layer, states[kind.name], inputs)
        return states

    return jax.jit(program, donate_argnums=0)


def measure(batch: int, format: str, layout: str, runs: int) -> dict[str, float]:
    """Microseconds: medians."""
    states, inputs = jax.block_until_ready(make_operands(batch, format, layout))

    def time_back_to_back(program, count: int) -> float:
        nonlocal states
        start = time.perf_counter()
        for _ in range(count):
            states = program(states, inputs)
        jax.block_until_ready(states)
        return (time.perf_counter() - start) / count

    def time_single_calls(program) -> list[float]:
        nonlocal states
        times = [time.perf_counter()]
        for _ in range(BURST):
            states = program(states, inputs)
            times.append(time.perf_counter())
        jax.block_until_ready(states)
        return list(np.diff(times)[FIRST_CALLS:])

    one, nine = make_program(1, layout), make_program(MANY_STEPS, layout)
    counts = {one: runs, nine: max(1, runs // MANY_STEPS)}
    for program in counts:
        time_back_to_back(program, 3)  # compiles, and captures graphs
    # In turns: a clock that drifts shifts both.
    rounds = [[time_back_to_back(*item) for item in counts.items()] for _ in range(ROUNDS)]
    of_one, of_nine = (1e6 * statistics.median(times) for times in zip(*rounds, strict=True))
    bursts = [time_single_calls(one) for _ in range(BURSTS)]
    dispatch = 1e6 * statistics.median(itertools.chain(*bursts))
    return {
        "step_us": round(of_one, 1),
        "dispatch_us": round(dispatch, 1),
        "gpu_us": round((of_nine - of_one) / (MANY_STEPS - 1), 1),
        "nine_us": round(of_nine, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    add("--batch", type=int, nargs="+", default=[16, 256])
    add("--runs", type=int, default=300, help="programs of one step in a row")
    add("--commit", help="what is measured, where this is no git checkout")
    add("--out", default="/dev/null", help="append JSON lines to this file")
    args = parser.parse_args()

    info = describe_environment(args.commit)
    calls = sum(kind.layers for kind in KINDS)
    print(f"{info['device']}, jax {info['jax']}, commit {info['commit']}")
    print(f"{calls} calls a step, next_n {NEXT_N}, state f32; us, medians of {ROUNDS} rounds")
    print(f"{'format':8} {'B':>4} {'layout':8} {'step':>9} {'dispatch':>9} {'GPU':>9}", flush=True)
    with open(args.out, "a") as out:
        for format in args.formats:
            for batch in args.batch:
                for layout in args.layouts:
                    point = {"format": format, "batch": batch, "layout": layout}
                    result = measure(batch, format, layout, args.runs)
                    out.write(json.dumps(point | {"calls": calls} | result | info) + "\n")
                    out.flush()
                    cells = (f"{result[key]:9.1f}" for key in ("step_us", "dispatch_us", "gpu_us"))
                    print(f"{format:8} {batch:4} {layout:8} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
