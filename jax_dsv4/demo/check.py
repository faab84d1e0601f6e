"""Records against float64, computed anew from the log of tokens; and bytes that are not theirs.

Nothing here uses the package's own arithmetic but ``dequantize_records``. With formats
``f32`` and ``bf16`` every channel must be right to a bf16 ulp; other formats allow more.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_dsv4 import RecordCache, dequantize_records
from jax_dsv4._formats import RecordFormat
from jax_dsv4.demo.model import Layers, Weights, project
from jax_dsv4.demo.scheduler import Span

# Checked, spread over the run: every layer of so many steps, and one layer of so many more.
FULL_STEPS, SAMPLED_STEPS = 16, 256
MOST_WINDOWS = 128  # compared of one request in one call; there are more only with prompts

# Of quantised formats: mantissa bits, smallest exponent and largest value of the code, channels of
# a block (0: the scale is 1), and whether scales are powers of two.
CODES = {
    "fp8": (3, -6, 448, 0, True),
    "fp8_ds_mla": (3, -6, 448, 64, True),
    "fp8_block128": (3, -6, 448, 128, False),
    "mxfp4": (1, 0, 6, 32, True),
}


class Sample(NamedTuple):
    """What one call stored, kept for the check."""

    layer: int
    spans: list[Span]
    values: Array  # [N, D] f32, of the windows that are compared, in the order of spans
    changed: Array  # bool, whether a byte that belongs to none of them has changed


class Verdict(NamedTuple):
    """What the check found."""

    verdict: str  # "OK", "MISMATCH" or "INCOMPLETE": some kind completed no window
    windows: dict[str, int]  # compared, by kind
    num_skipped: int  # further windows that the calls looked at completed
    max_error: float  # of what is allowed; at most 1 is right
    num_changed: int  # calls that changed a byte which belongs to no record of theirs


def choose_layers(
    layers: Layers, step: int, num_steps: int, rng: np.random.Generator
) -> Sequence[int]:
    """The layers of one kind whose records are looked at in this step."""
    every_layer, one_layer = -(-num_steps // FULL_STEPS), -(-num_steps // SAMPLED_STEPS)
    if step % every_layer == every_layer // 2:
        return range(layers.count)
    return (int(rng.integers(layers.count)),) if step % one_layer == 0 else ()


def choose_windows(layers: Layers, span: Span) -> np.ndarray:
    """Those compared of a span: all, or of very many some, the first and the last among them."""
    windows = np.array(span.windows(layers.compress_ratio), int)
    if len(windows) <= MOST_WINDOWS:
        return windows
    return windows[np.linspace(0, len(windows) - 1, MOST_WINDOWS).astype(int)]


def take_sample(
    layers: Layers,
    layer: int,
    records: RecordCache,
    tables: np.ndarray,
    spans: list[Span],
    before: Array,
    size: int,
) -> Sample:
    """From a layer's pool ``before`` a step and after it; at least ``size`` slots are read."""
    page_size = records.page_size

    def find_slots(span: Span, windows: np.ndarray) -> np.ndarray:
        return tables[span.slot, windows // page_size] * page_size + windows % page_size

    kept = np.ones((len(before), page_size), bool)
    for span in spans:
        kept.flat[find_slots(span, np.array(span.windows(layers.compress_ratio), int))] = False
    slots = [find_slots(span, choose_windows(layers, span)) for span in spans]
    slots = np.concatenate([*slots, np.zeros(0, int)])
    padded = np.pad(slots, (0, max(size - len(slots), 0)), constant_values=-1).astype(np.int32)
    values = read_records(records, padded, layer=np.int32(layer))
    return Sample(layer, spans, values, has_changed(before, records, layer, kept))


@jax.jit
def copy_pool(records: RecordCache, layer: int) -> Array:
    """The bytes of a layer, which the next step may change."""
    return records.pool[layer]


@jax.jit
def has_changed(before: Array, records: RecordCache, layer: int, kept: np.ndarray) -> Array:
    """Whether a byte of the layer changed that belongs to a record of ``kept``, or to none."""
    different, found, start = records.pool[layer] != before, jnp.bool_(False), 0
    kind = RecordFormat(records.format, records.head_dim)
    for size in (kind.data_bytes, kind.scale_bytes):
        end = start + kept.shape[1] * size
        found |= jnp.any(different[:, start:end].reshape(*kept.shape, size) & kept[..., None])
        start = end
    return found | jnp.any(different[:, start:])  # padding


read_records = jax.jit(dequantize_records)


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
    num_changed = sum(bool(sample.changed) for kind in samples.values() for sample in kind)
    max_error = float(np.max(np.concatenate(list(errors.values())), initial=0))
    verdict = "MISMATCH"
    if max_error <= 1 and not num_changed:  # not so for NaN
        verdict = "OK" if all(errors.values()) else "INCOMPLETE"
    counts = {name: len(found) for name, found in errors.items()}
    completed = sum(
        len(span.windows(layers.compress_ratio))
        for layers in model
        for sample in samples[layers.name]
        for span in sample.spans
    )
    return Verdict(verdict, counts, completed - sum(counts.values()), max_error, num_changed)


def compare(sample: Sample, layers: Layers, weights: Weights) -> list[float]:
    """The largest error of each record, as a part of what is allowed."""
    want, factors = make_records_float64(layers, sample.layer, weights, sample.spans)
    got = np.asarray(sample.values)[: len(want)].astype(np.float64)
    allowed = allowed_error(want, factors, layers.record_format)
    return list(np.max(np.abs(got - want) / allowed, axis=1))


def allowed_error(values: np.ndarray, factors: np.ndarray, record_format: str) -> np.ndarray:
    """A bf16 ulp of each value; of quantised channels half a step of their code more.

    An ulp is at least 2^-20 times the factor of the record's norm: below that, f32 sums of numbers
    near 1 have no correct digits.
    """
    ulp = np.maximum(np.exp2(np.frexp(values)[1] - 8.0), 2.0**-20 * factors)
    if record_format not in CODES:
        return ulp
    mantissa_bits, min_exponent, largest, block, power_of_two = CODES[record_format]
    quantized = np.abs(values[:, : 448 if record_format == "fp8_ds_mla" else None])
    scale = np.ones((1, 1))
    if block:
        amax = quantized.reshape(len(values), quantized.shape[1] // block, block).max(-1)
        scale = (
            np.maximum(amax, 1e-4) * (1 + 2.0**-8) / largest
        )  # by an ulp, the stored one's error
        if power_of_two:
            scale = np.exp2(np.ceil(np.log2(scale)))
        scale = scale.repeat(block, axis=1)
    exponents = np.maximum(np.frexp(quantized / scale)[1] - 1, min_exponent)
    ulp[:, : quantized.shape[1]] += scale * np.exp2(exponents - mantissa_bits - 1)
    return ulp


def make_records_float64(
    layers: Layers, layer: int, weights: Weights, spans: Sequence[Span]
) -> tuple[np.ndarray, np.ndarray]:
    """What a call should store [N, D], before it is quantised; and the norm's factors [N, 1]."""
    values = [compress_float64(layers, layer, weights, span) for span in spans]
    values = np.concatenate([np.zeros((0, layers.head_dim)), *values])
    windows = [window for span in spans for window in choose_windows(layers, span)]
    factors = 1 / np.sqrt(np.mean(values**2, axis=1, keepdims=True) + 1e-6)
    values *= factors * weights.norms[layer]
    table = weights.cos_sin_cache[np.array(windows, int) * layers.compress_ratio]
    cos, sin = np.split(table.astype(np.float64), 2, axis=1)
    even, odd = values[:, -64::2].copy(), values[:, -63::2].copy()
    values[:, -64::2], values[:, -63::2] = even * cos - odd * sin, odd * cos + even * sin
    if layers.hadamard:
        values = values @ make_hadamard(layers.head_dim)
    return values, factors


@functools.cache
def make_hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix [size, size], of norm 1."""
    if size == 1:
        return np.ones((1, 1))
    return np.kron([[1, 1], [1, -1]], make_hadamard(size // 2)) / np.sqrt(2)


def compress_float64(layers: Layers, layer: int, weights: Weights, span: Span) -> np.ndarray:
    """[windows, D]: the compressed values, from the log of the request's tokens."""
    ratio, head_dim = layers.compress_ratio, layers.head_dim
    windows = choose_windows(layers, span)
    positions = windows[:, None] * ratio + np.arange(-ratio if layers.overlap else 0, ratio)
    rows = project(weights, span.tokens[np.maximum(positions, 0)], layer).astype(np.float32)
    kv, score = np.split(rows, 2, axis=2)
    score = score + weights.apes[layer][positions % ratio]  # in f32: as stored
    if layers.overlap:  # the window before counts by its first half
        kv, score = (
            np.concatenate([x[:, :ratio, :head_dim], x[:, ratio:, head_dim:]], axis=1)
            for x in (kv, score)
        )
    score = np.where(positions[..., None] >= 0, score.astype(np.float64), -np.inf)
    weight = np.exp(score - score.max(1, keepdims=True, initial=-np.inf))
    return (weight * kv).sum(1) / weight.sum(1)
