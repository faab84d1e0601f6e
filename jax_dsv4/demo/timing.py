"""What the calls of one kind cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import jax

from jax_dsv4 import CompressorState
from jax_dsv4.demo.model import Layers, Weights, compress_layers, project
from jax_dsv4.demo.scheduler import Plan

# REPLAYED_STEPS of the loop's steps are one program. A round runs it RUNS times in a row.
REPLAYED_STEPS, RUNS, ROUNDS = 16, 4, 5


def measure_seconds_per_call(
    layers: Layers,
    state: CompressorState,
    weights: Weights,
    plans: Sequence[Plan],
    implementation: str | None,
) -> float:
    """Time of a program with all of a kind's calls in ``plans``, by the number of calls.

    The program is long and runs several times in a row, so that starting it hardly counts. It has
    no projections, and returns only the state. The layer changes from call to call and the rows
    from plan to plan, so that a state is as cold as its size makes it; but no other kind's calls
    come between, as in a step.
    """

    def replay(state, kv_scores, apes, plans):
        for plan in plans:
            _, state = compress_layers(layers, state, kv_scores, apes, plan, implementation)
        return state

    program = jax.jit(replay, donate_argnums=0)
    kv_scores = [project(weights, plans[0].tokens, layer) for layer in range(layers.count)]
    operands = jax.device_put((kv_scores, weights.apes, plans))
    times = []
    for _ in range(1 + ROUNDS):  # the first one compiles
        jax.block_until_ready((state, operands))
        start = time.perf_counter()
        for _ in range(RUNS):
            state = program(state, *operands)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / (RUNS * len(plans) * layers.count)
