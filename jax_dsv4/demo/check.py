"""Emitted values against float64, computed anew from the log of tokens.

Nothing here uses the package's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax import Array

from jax_dsv4.demo.model import Layers, Weights, project
from jax_dsv4.demo.scheduler import Span

# Checked, spread over the run: every layer of so many steps, and one layer of so many more.
FULL_STEPS, SAMPLED_STEPS = 16, 256


class Sample(NamedTuple):
    """What one call emitted, kept for the check."""

    layer: int
    kv_comp: Array  # [B, M, D]
    spans: list[Span]


class Verdict(NamedTuple):
    """What the check found."""

    verdict: str  # "OK", "MISMATCH" or "INCOMPLETE": some kind completed no window
    windows: dict[str, int]  # compared, by kind
    max_error: float  # in bf16 ulps of the float64 value; at most 1 is right


def choose_layers(
    layers: Layers, step: int, num_steps: int, rng: np.random.Generator
) -> Sequence[int]:
    """The layers of one kind whose values are kept in this step."""
    every_layer, one_layer = -(-num_steps // FULL_STEPS), -(-num_steps // SAMPLED_STEPS)
    if step % every_layer == every_layer // 2:
        return range(layers.count)
    return (int(rng.integers(layers.count)),) if step % one_layer == 0 else ()


def check_samples(
    model: Sequence[Layers],
    samples: Mapping[str, Sequence[Sample]],
    weights: Mapping[str, Weights],
) -> Verdict:
    """Compare the samples, by kind, with float64."""
    errors = {
        layers.name: [
            error
            for sample in samples[layers.name]
            for error in compare(sample, layers, weights[layers.name])
        ]
        for layers in model
    }
    max_error = float(np.max(np.concatenate(list(errors.values())), initial=0))
    verdict = "MISMATCH"
    if max_error <= 1:  # not so for NaN
        verdict = "OK" if all(errors.values()) else "INCOMPLETE"
    return Verdict(verdict, {name: len(found) for name, found in errors.items()}, max_error)


def compare(sample: Sample, layers: Layers, weights: Weights) -> list[float]:
    """The largest error of each completed window, in bf16 ulps of the float64 value.

    An ulp is at least 2^-20: below that, f32 sums of numbers near 1 have no correct digits. Rows
    that hold no window must be zero; else there is one more error, infinite.
    """
    kv_comp, errors = np.asarray(sample.kv_comp).astype(np.float64), []
    for span in sample.spans:
        want = compress_float64(layers, sample.layer, weights, span)
        got = kv_comp[span.slot, : len(want)]
        ulp = np.exp2(np.maximum(np.frexp(want)[1] - 8, -20))
        errors += list(np.max(np.abs(got - want) / ulp, axis=1))
        kv_comp[span.slot, : len(want)] = 0
    if np.any(kv_comp != 0):
        errors.append(np.inf)
    return errors


def compress_float64(layers: Layers, layer: int, weights: Weights, span: Span) -> np.ndarray:
    """[windows completed, D]: what a request's step should emit, from the log of its tokens."""
    ratio, head_dim = layers.compress_ratio, layers.head_dim
    first = find_first_needed(layers, span.length)
    rows = project(weights, span.tokens[first:], layer).astype(np.float32)
    kv, score = np.split(rows, 2, axis=1)
    bias = weights.apes[layer][np.arange(first, len(span.tokens)) % ratio]
    score = score + bias  # in f32: as stored
    values = []
    for window in range(span.length // ratio, len(span.tokens) // ratio):
        start = window * ratio - first
        parts = [(slice(start, start + ratio), slice(-head_dim, None))]
        if layers.overlap and window > 0:
            parts.append((slice(start - ratio, start), slice(head_dim)))
        scores = np.concatenate([score[part] for part in parts]).astype(np.float64)
        exps = np.exp(scores - scores.max(0))
        values.append((exps * np.concatenate([kv[p] for p in parts])).sum(0) / exps.sum(0))
    return np.reshape(values, (-1, head_dim))


def find_first_needed(layers: Layers, length: int) -> int:
    """The first token behind the windows that a sequence of this length has yet to complete."""
    return max(length // layers.compress_ratio - layers.overlap, 0) * layers.compress_ratio
