"""What the calls of one kind cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_dsv4 import CompressorCache
from jax_dsv4.demo.model import Layers, Weights, call_layers, project
from jax_dsv4.demo.scheduler import Plan

# REPLAYED_STEPS of the loop's steps are one program. A round runs it RUNS times in a row.
REPLAYED_STEPS, RUNS, ROUNDS = 16, 4, 3


def measure_seconds_per_call(
    layers: Layers,
    cache: CompressorCache,
    weights: Weights,
    plans: Sequence[Plan],
    **attributes: Any,
) -> float:
    """Time of a program with all of a kind's calls in ``plans``, by the number of calls.

    The program is long and runs several times in a row, so that starting it hardly counts. It has
    no projections. Plans are a loop in it: unrolled, they would take longer to compile than all
    else. The layer changes from call to call and the rows from plan to plan, so that a cache is as
    cold as its size makes it; but no other kind's calls come between, as in a step.
    """

    def replay(cache, kv_scores, weights, plans):
        def step(cache, plan):
            return call_layers(layers, cache, kv_scores, weights, plan, **attributes), None

        return jax.lax.scan(step, cache, plans)[0]

    program = jax.jit(replay, donate_argnums=0)
    kv_scores = [project(weights, plans[0].tokens, layer) for layer in range(layers.count)]
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *plans)
    operands = jax.device_put((kv_scores, weights, stacked))
    times = []
    for _ in range(1 + ROUNDS):  # the first one compiles
        jax.block_until_ready((cache, operands))
        start = time.perf_counter()
        for _ in range(RUNS):
            cache = program(cache, *operands)
        jax.block_until_ready(cache)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / (RUNS * len(plans) * layers.count)
