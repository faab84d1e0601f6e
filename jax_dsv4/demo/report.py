"""What the demo says: progress on stderr, figures on stdout and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from jax_dsv4.demo.check import MOST_WINDOWS, Verdict
from jax_dsv4.demo.model import Layers
from jax_dsv4.demo.scheduler import Scheduler
from jax_dsv4.demo.timing import ROUNDS, RUNS

Figures = dict[str, Any]


def log(text: str) -> None:
    """Say on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print on stdout, at once even where that is a file or a pipe."""
    print(text, flush=True)


def track(steps: int) -> Iterator[int]:
    """Count the decode steps on stderr: as a bar on a terminal, elsewhere a line per quarter."""
    if sys.stderr.isatty():
        yield from tqdm(range(steps), desc="decoding", unit="step")
        return
    for done in range(1, steps + 1):
        yield done - 1
        if 4 * done // steps != 4 * (done - 1) // steps:
            log(f"decoding {done}/{steps}")


def show_setting(options: Mapping[str, Any], model: Sequence[Layers]) -> Figures:
    """Print what runs, and where."""
    packages = ("jax_dsv4", "jax", "jaxlib", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    device = jax.devices()[0].device_kind
    formats = {layers.name: layers.record_format for layers in model}
    show(
        f"DeepSeek-V4-{options['model'].capitalize()}, compressor calls only: "
        f"batch {options['batch']}, next_n {options['next_n']}, {options['steps']} steps, "
        f"accept {options['accept']}\n"
        f"on {device}, jax {versions['jax']}, implementation {options['implementation']}, "
        f"{options['state_format']} f32 state, page size {options['page_size']}, "
        f"seed {options['seed']}\n"
        f"{show_prompts(options)}"
        f"records: {', '.join(f'{name} {form}' for name, form in formats.items())}"
    )
    return {
        "options": dict(options),
        "record_formats": formats,
        "versions": versions | {"python": platform.python_version()},
        "platform": jax.default_backend(),
        "device": device,
    }


def show_prompts(options: Mapping[str, Any]) -> str:
    """A line on the prompts, if there are any."""
    if not options["prompt"]:
        return ""
    return (
        f"prompts of {', '.join(map(str, options['prompt']))} tokens in turn, in chunks of at most "
        f"{options['chunk']}, from a cached prefix with probability {options['shared']}\n"
    )


def show_prefill(scheduler: Scheduler, step_seconds: Mapping[bool, Sequence[float]]) -> Figures:
    """Print how fast prompts were; ``step_seconds``: of steps with and without chunks of them."""
    seconds = sum(map(sum, step_seconds.values()))
    with_prompts, without = (
        {"steps": len(x), "ms_per_step": sum(x) / max(len(x), 1) * 1e3}
        for x in (step_seconds[True], step_seconds[False])
    )
    figures = {
        "tokens": scheduler.prefilled,
        "tokens_per_second": scheduler.prefilled / seconds,
        "requests_from_a_cached_prefix": scheduler.sharing,
        "tokens_of_cached_prefixes": scheduler.reused,
        "steps_with_prompts": with_prompts,
        "steps_without": without,
    }
    show(
        f"prefill tokens/s: {figures['tokens_per_second']:,.0f} ({scheduler.prefilled} in the same "
        f"time; {scheduler.reused} more came from cached prefixes, with {scheduler.sharing} "
        "requests)\n"
        f"steps with chunks of prompts: {with_prompts['steps']}, of "
        f"{with_prompts['ms_per_step']:.2f} ms; without: {without['steps']}, of "
        f"{without['ms_per_step']:.2f} ms"
    )
    return figures


def show_decoding(scheduler: Scheduler, steps: int, seconds: float) -> Figures:
    """Print how fast the loop was."""
    figures = {
        "requests_started": scheduler.started,
        "requests_finished": scheduler.finished,
        "drafts_rejected": scheduler.rejected,
        "tokens_accepted": scheduler.accepted,
        "tokens_per_second": scheduler.accepted / seconds,
        "seconds": seconds,
        "ms_per_step": seconds / steps * 1e3,
    }
    show(
        "requests: {requests_started} started, {requests_finished} finished; "
        "drafts rejected: {drafts_rejected}\n"
        "decode tokens/s: {tokens_per_second:,.0f} ({tokens_accepted} accepted in {seconds:.2f} s; "
        "{ms_per_step:.2f} ms per step, with scheduling and projections)".format(**figures)
    )
    return figures


def show_calls(
    model: Sequence[Layers],
    seconds_per_call: Mapping[str, float],
    num_bytes: Mapping[str, tuple[int, int]],
    replayed_steps: int,
) -> Figures:
    """Print what each kind of call costs."""
    calls = {layers.name: layers.count for layers in model}
    seconds = {name: calls[name] * seconds_per_call[name] for name in calls}  # per step
    calls["all"], seconds["all"] = sum(calls.values()), sum(seconds.values())
    sizes = {**num_bytes, "all": tuple(map(sum, zip(*num_bytes.values(), strict=True)))}
    show("\nkind     calls/step   us/call    time     state bytes    record bytes")
    row = "{calls_per_step:10} {us_per_call:9.2f} {share:7.1%} {state_bytes:15,} {record_bytes:15,}"
    by_kind = {}
    for name in calls:
        by_kind[name] = {
            "calls_per_step": calls[name],
            "us_per_call": seconds[name] / calls[name] * 1e6,
            "share": seconds[name] / seconds["all"],
            "state_bytes": sizes[name][0],
            "record_bytes": sizes[name][1],
        }
        show(f"{name:8} " + row.format(**by_kind[name]))
    ms_per_step = seconds["all"] * 1e3
    show(
        f"us/call: one kind at a time, the calls of {replayed_steps} of the steps in one program "
        f"without projections,\n{RUNS} times in a row: median of {ROUNDS} rounds, by the number of "
        "calls. What fits in the cache is found there.\n"
        f"All kinds: {ms_per_step:.3f} ms per step.\n"
    )
    return {
        "by_kind": by_kind,
        "replayed_steps": replayed_steps,
        "runs": RUNS,
        "rounds": ROUNDS,
        "ms_per_step": ms_per_step,
    }


def show_check(found: Verdict) -> Figures:
    """Print the verdict."""
    total = sum(found.windows.values())
    counts = ", ".join(f"{name} {count}" for name, count in found.windows.items())
    hint = " (more --steps needed)" if found.verdict == "INCOMPLETE" else ""
    skipped = ""
    if found.num_skipped:
        skipped = (
            f"; not compared of these calls: {found.num_skipped}, where a request completed more "
            f"than {MOST_WINDOWS}"
        )
    show(
        f"check: {found.verdict}{hint}, {total} records compared with float64 ({counts}), "
        f"max error {found.max_error:.3f} of what is allowed: 1 bf16 ulp, and half a step of a "
        f"quantised code; calls that changed other bytes: {found.num_changed} (allowed: 0){skipped}"
    )
    return {
        "verdict": found.verdict,
        "windows": total,
        "windows_by_kind": found.windows,
        "windows_not_compared": found.num_skipped,
        "most_windows_of_a_request": MOST_WINDOWS,
        "max_error": found.max_error,
        "allowed": 1,
        "calls_that_changed_other_bytes": found.num_changed,
    }


def write_json(path: pathlib.Path, figures: Figures) -> None:
    """All figures as one object; ``null`` for a number that is not finite, which JSON lacks."""
    finite = json.loads(json.dumps(figures), parse_constant=lambda name: None)
    path.write_text(json.dumps(finite, indent=2, allow_nan=False) + "\n")
