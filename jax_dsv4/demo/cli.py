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

from jax_dsv4 import RECORD_FORMATS, STATE_FORMATS, CompressorCache, live
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
from jax_dsv4.demo.scheduler import Plan, Scheduler, Span, Traffic, find_resume_every
from jax_dsv4.demo.timing import REPLAYED_STEPS, measure_seconds_per_call

BATCH, STEPS = {"cpu": 8, "gpu": 64}, {"cpu": 256, "gpu": 512}  # defaults, by platform
STATUS = {"OK": 0, "MISMATCH": 1, "INCOMPLETE": 3}  # by verdict
WRONG_OPTION = 2  # as argparse has it
INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + the signal's number, as shells have it


class OptionError(Exception):
    """A wrong option, found after the command line was parsed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status."""
    return run_command(lambda: STATUS[run(parse(arguments))])


def run_command(command: Callable[[], int]) -> int:
    """Run a command that returns its exit status; or the status of how it was ended."""
    try:
        return command()
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_OPTION
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
    attributes: dict[str, Any] = {
        "implementation": None if options.implementation == "auto" else options.implementation
    }
    if options.prompt:
        every = find_resume_every(options.page_size)
        attributes["store_rows"] = live(max_rewind=options.next_n - 1, resume_every=every)
    rng = np.random.default_rng(options.seed)
    try:
        scheduler = make_scheduler(model, options, rng)
        caches = {x.name: init_layers(x, scheduler.pages[x.name]) for x in model}
    except (ValueError, MemoryError, jax.errors.JaxRuntimeError) as error:
        sizes = "--batch, --next-n, --page-size, --prompt, --chunk"
        raise OptionError(f"{sizes}: no caches of this size: {error}") from error
    host_weights = {
        layers.name: make_weights(layers, rng, scheduler.traffic.longest) for layers in model
    }
    weights = jax.device_put(host_weights)
    step = make_step(model, **attributes)
    decoded = decode(model, scheduler, step, caches, weights, options.steps)
    seconds = sum(map(sum, decoded.step_seconds.values()))
    figures["decoding"] = report.show_decoding(scheduler, options.steps, seconds)
    if options.prompt:
        figures["prefill"] = report.show_prefill(scheduler, decoded.step_seconds)

    report.log("timing each kind of call")
    # Steps in plain jnp are slow.
    plans = decoded.plans[:2] if options.implementation == "xla" else decoded.plans
    num_bytes = {
        name: (cache.state.kv.nbytes + cache.state.score.nbytes, cache.records.pool.nbytes)
        for name, cache in decoded.caches.items()
    }
    seconds_per_call = {
        layers.name: measure_seconds_per_call(
            layers, decoded.caches[layers.name], weights[layers.name], plans, **attributes
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
    traffic = Traffic(options.prompt, options.chunk, options.shared)
    sizes = {key: getattr(options, key) for key in ("batch", "next_n", "page_size", "state_format")}
    pages = {layers.name: make_pages(layers, **sizes, traffic=traffic) for layers in model}
    return Scheduler(
        pages,
        batch=options.batch,
        next_n=options.next_n,
        accept=options.accept,
        rng=rng,
        traffic=traffic,
        resume_every=find_resume_every(options.page_size),
    )


class Decoded(NamedTuple):
    """What the decode loop leaves behind."""

    caches: dict[str, CompressorCache]  # by kind, as is the next
    samples: dict[str, list[Sample]]
    plans: list[Plan]  # of some steps, to be replayed; with prompts, of those that bring any
    step_seconds: dict[bool, list[float]]  # by whether a step brings rows of prompts


def decode(
    model: Sequence[Layers],
    scheduler: Scheduler,
    step: Callable[..., Any],
    caches: dict[str, CompressorCache],
    weights: dict[str, Weights],
    num_steps: int,
) -> Decoded:
    """The loop: plan a step while the device works on the one before, then start it.

    The caches that it is given are donated.
    """
    samples: dict[str, list[Sample]] = {layers.name: [] for layers in model}

    # With prompts, pools are so large that most of the time is the check's: the clock stops for it.
    stop_clock, stopped = bool(scheduler.traffic.prompts), 0.0

    def advance(plan: Plan, spans: list[Span], chosen: dict[Layers, Sequence[int]]) -> None:
        """One step; the layers that were chosen are sampled."""
        nonlocal caches, stopped
        start = time.perf_counter()
        before = {
            (layers, layer): copy_pool(caches[layers.name].records, layer)
            for layers in model
            for layer in chosen[layers]
        }
        if stop_clock:
            jax.block_until_ready(list(before.values()))
            stopped += time.perf_counter() - start
        caches = step(caches, weights, plan)
        if stop_clock:
            jax.block_until_ready(caches)
            start = time.perf_counter()
        for (layers, layer), pool in before.items():
            records, tables = caches[layers.name].records, plan.tables[layers.name].records
            sample = take_sample(layers, layer, records, tables, spans, pool, plan.tokens.size)
            samples[layers.name].append(sample)
            if stop_clock:
                jax.block_until_ready(sample)
        if stop_clock:
            stopped += time.perf_counter() - start

    report.log("compiling")
    no_requests = [scheduler.plan(arrivals=False)]  # steps of inactive slots change nothing
    if scheduler.traffic.prompts:
        no_requests.append(scheduler.plan(arrivals=False, full=True))
    for plan in no_requests:
        advance(plan, [], {layers: [0] for layers in model})
    jax.block_until_ready((caches, samples))

    plans, replay_every = [], -(-num_steps // REPLAYED_STEPS)
    brings_prompts, times = [], []
    for index in report.track(num_steps):
        plan = scheduler.plan()
        chosen = {x: choose_layers(x, index, num_steps, scheduler.rng) for x in model}
        jax.block_until_ready(caches)
        times.append(time.perf_counter() - stopped)
        advance(plan, scheduler.list_spans(plan), chosen)
        brings_prompts.append(plan.tokens.size > no_requests[0].tokens.size)
        if index % replay_every == replay_every // 2:
            plans.append(plan)
        scheduler.settle(plan)
    jax.block_until_ready(caches)
    times.append(time.perf_counter() - stopped)
    step_seconds: dict[bool, list[float]] = {False: [], True: []}
    for with_prompts, seconds in zip(brings_prompts, np.diff(times).tolist(), strict=True):
        step_seconds[with_prompts].append(seconds)
    # Replayed are those of one shape.
    largest = max(plan.tokens.size for plan in plans)
    plans = [plan for plan in plans if plan.tokens.size == largest]
    # After one more step all records of its requests are compared: none may have been lost.
    plan = scheduler.plan(arrivals=False)
    spans = [span._replace(length=0) for span in scheduler.list_spans(plan)]
    advance(plan, spans, {x: [int(scheduler.rng.integers(x.count))] for x in model})
    return Decoded(caches, samples, plans, step_seconds)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; default batch and steps are what the platform has time for."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_dsv4",
        description="Continuous-batching decode with all compressor calls of a DeepSeek-V4 model: "
        "requests arrive, are decoded with drafts of which some are rejected, and finish. With "
        "--prompt they bring prompts, which go in chunks through the same ragged batches. "
        "Compares records with float64; reports speed and memory.",
        epilog="Exit status: 0 if all records that were compared are right, and no other byte has "
        "changed; 1 if not, or after an error; 2 for a wrong option; 3 if a kind of layer "
        "completed no window to compare (check: INCOMPLETE); 130 if interrupted; 141 if the "
        "reader of the output went away.",
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
    add(
        "--prompt",
        type=lengths,
        default=(),
        metavar="LENGTHS",
        help="tokens of the requests' prompts, in turn, such as 300,2000,100000 (default: no "
        "prompts); a request waits where records have no room for it",
    )
    chunk = "the most rows that a prompt brings per step (default: %(default)s); all: twice"
    add("--chunk", type=at_least(1), default=256, help=chunk)
    add(
        "--shared",
        type=probability,
        default=0.5,
        help="probability that a request starts from the cached prefix of an earlier one's prompt, "
        "where that is shorter than its own (default: %(default)s)",
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


def lengths(text: str) -> tuple[int, ...]:
    """An argparse type: numbers of tokens, with commas between them."""
    return tuple(map(at_least(1), text.split(",")))


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
