"""The demo's command line."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_dsv4 import RECORD_FORMATS, STATE_FORMATS, CompressorCache
from jax_dsv4.demo import report
from jax_dsv4.demo.check import Sample, check_samples, choose_layers, copy_pool, take_sample
from jax_dsv4.demo.model import (
    INDEXER_FORMATS,
    LAYERS,
    Layers,
    Weights,
    init_layers,
    list_layers,
    make_pages,
    make_step,
    make_weights,
)
from jax_dsv4.demo.scheduler import Plan, Scheduler, Span
from jax_dsv4.demo.timing import REPLAYED_STEPS, measure_seconds_per_call

BATCH, STEPS = {"cpu": 8, "gpu": 64}, {"cpu": 256, "gpu": 512}  # defaults, by platform
STATUS = {"OK": 0, "MISMATCH": 1, "INCOMPLETE": 3}  # by verdict; a wrong option is argparse's 2
INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + the signal's number, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status."""
    try:
        return STATUS[run(parse(arguments))]
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        discard_output_to_closed_pipes()
        return PIPE_CLOSED


def run(options: argparse.Namespace) -> str:
    """Decode, time, check and report; the verdict."""
    model = list_layers(options.model, options.records)
    figures = report.show_setting({k: v for k, v in vars(options).items() if k != "json"}, model)
    if jax.default_backend() == "cpu":
        sizes = f"batch {BATCH['gpu']}, {STEPS['gpu']} steps"
        report.show(f"the defaults are small on a CPU; on a GPU they are {sizes}")
    implementation = None if options.implementation == "auto" else options.implementation
    rng = np.random.default_rng(options.seed)
    scheduler = make_scheduler(model, options, rng)
    host_weights = {layers.name: make_weights(layers, rng) for layers in model}
    weights = jax.device_put(host_weights)
    decoded = decode(model, scheduler, make_step(model, implementation), weights, options.steps)
    figures["decoding"] = report.show_decoding(scheduler, options.steps, decoded.seconds)

    report.log("timing each kind of call")
    # Steps in plain jnp are slow.
    plans = decoded.plans[:2] if implementation == "xla" else decoded.plans
    num_bytes = {
        name: (cache.state.kv.nbytes + cache.state.score.nbytes, cache.records.pool.nbytes)
        for name, cache in decoded.caches.items()
    }
    seconds_per_call = {
        layers.name: measure_seconds_per_call(
            layers, decoded.caches[layers.name], weights[layers.name], plans, implementation
        )
        for layers in model
    }
    figures["calls"] = report.show_calls(model, seconds_per_call, num_bytes, len(plans))

    report.log("checking")
    found = check_samples(model, decoded.samples, host_weights)
    figures["check"] = report.show_check(found)
    if options.json:
        report.write_json(options.json, figures)
    return found.verdict


def make_scheduler(
    model: Sequence[Layers], options: argparse.Namespace, rng: np.random.Generator
) -> Scheduler:
    """No requests yet, and pages for each kind of layer."""
    sizes = {key: getattr(options, key) for key in ("batch", "next_n", "page_size", "state_format")}
    pages = {layers.name: make_pages(layers, **sizes) for layers in model}
    return Scheduler(
        pages, batch=options.batch, next_n=options.next_n, accept=options.accept, rng=rng
    )


class Decoded(NamedTuple):
    """What the decode loop leaves behind."""

    caches: dict[str, CompressorCache]  # by kind, as is the next
    samples: dict[str, list[Sample]]
    plans: list[Plan]  # of some steps, to be replayed
    seconds: float


def decode(
    model: Sequence[Layers],
    scheduler: Scheduler,
    step: Callable[..., Any],
    weights: dict[str, Weights],
    num_steps: int,
) -> Decoded:
    """The loop: plan a step while the device works on the one before, then start it."""
    caches = {layers.name: init_layers(layers, scheduler.pages[layers.name]) for layers in model}
    samples: dict[str, list[Sample]] = {layers.name: [] for layers in model}

    def advance(plan: Plan, spans: list[Span], chosen: dict[Layers, Sequence[int]]) -> None:
        """One step; the layers that were chosen are sampled."""
        nonlocal caches
        before = {
            (layers, layer): copy_pool(caches[layers.name].records, layer)
            for layers in model
            for layer in chosen[layers]
        }
        caches = step(caches, weights, plan)
        for (layers, layer), pool in before.items():
            records, tables = caches[layers.name].records, plan.tables[layers.name].records
            sample = take_sample(layers, layer, records, tables, spans, pool, plan.tokens.size)
            samples[layers.name].append(sample)

    report.log("compiling")
    no_request = scheduler.plan(arrivals=False)  # a step of inactive slots changes nothing
    advance(no_request, [], {layers: [0] for layers in model})
    jax.block_until_ready((caches, samples))

    plans, replay_every = [], -(-num_steps // REPLAYED_STEPS)
    start = time.perf_counter()
    for index in report.track(num_steps):
        plan = scheduler.plan()
        chosen = {x: choose_layers(x, index, num_steps, scheduler.rng) for x in model}
        jax.block_until_ready(caches)
        advance(plan, scheduler.list_spans(plan), chosen)
        if index % replay_every == replay_every // 2:
            plans.append(plan)
        scheduler.settle(plan)
    jax.block_until_ready(caches)
    seconds = time.perf_counter() - start
    # After one more step all records of its requests are compared: none may have been lost.
    plan = scheduler.plan(arrivals=False)
    spans = [span._replace(length=0) for span in scheduler.list_spans(plan)]
    advance(plan, spans, {x: [int(scheduler.rng.integers(x.count))] for x in model})
    return Decoded(caches, samples, plans, seconds)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; default batch and steps are what the platform has time for."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_dsv4",
        description="Continuous-batching decode with all compressor calls of a DeepSeek-V4 model: "
        "requests arrive, are decoded with drafts of which some are rejected, and finish. "
        "Compares records with float64; reports speed and memory.",
        epilog="Exit status: 0 if all records that were compared are right, and no other byte has "
        "changed; 1 if not; 2 for a wrong option; 3 if a kind of layer completed no window to "
        "compare (check: INCOMPLETE); 130 if interrupted; 141 if the reader of the output went "
        "away.",
    )
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    by_platform = "(default: {cpu} on a CPU, {gpu} on a GPU)"
    add = parser.add_argument
    add("--model", choices=LAYERS, default="flash", help="whose layers (default: %(default)s)")
    slots = "request slots " + by_platform.format(**BATCH)
    add("--batch", type=at_least(1), default=BATCH[platform], help=slots)
    add("--next-n", type=at_least(1), default=4, help="1 + drafts (default: %(default)s)")
    steps = "decode steps " + by_platform.format(**STEPS)
    add("--steps", type=at_least(1), default=STEPS[platform], help=steps)
    add(
        "--accept",
        type=probability,
        default=0.8,
        help="probability that a draft is accepted if those before it are (default: %(default)s)",
    )
    add("--page-size", type=at_least(1), default=32, help="rows per page (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, help="of all that is random (default: %(default)s)")
    add(
        "--state-format",
        choices=STATE_FORMATS,
        default="raw",
        help="what the states' rows hold: tokens, or prefixes of windows (default: %(default)s)",
    )
    add(
        "--records",
        choices=RECORD_FORMATS,  # all of them can have D 512
        default="fp8_ds_mla",
        metavar="FORMAT",
        help="format of the main compressors' records: %(choices)s (default: %(default)s); those "
        f"of the indexer are fp8_block128, or with {', '.join(INDEXER_FORMATS)} the same",
    )
    add(
        "--implementation",
        choices=("auto", "ffi", "xla"),
        default="auto",
        help="ffi: the compiled kernels; xla: the jnp reference; auto (default): the compiled "
        "kernels where there are any",
    )
    add(
        "--json",
        type=writable_file,
        metavar="FILE",
        help="also write all figures, the options and the versions, as one JSON object",
    )
    return parser.parse_args(arguments)


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer with a lower bound."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected at least {minimum}, got {text}")
        return int(text)

    return integer


def probability(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return float(text)


def writable_file(text: str) -> pathlib.Path:
    """An argparse type: a file that can be written, found out before the run rather than after."""
    path = pathlib.Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}")
    return path


def discard_output_to_closed_pipes() -> None:
    """Let Python's flush at exit succeed, which would print an error and change the status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
