"""The main job: continuous-batching decode with all compressor calls of a DeepSeek-V4 model.

Requests arrive, are decoded with drafts of which some are rejected, and finish. A step is one
jitted program with donated state. What stands for the rest of the model is random; what the
compressor calls emit is real, and compared with float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_dsv4 import (
    STATE_FORMATS,
    CompressorState,
    _config,
    init_state,
    live_pages,
    paged_kv_compress,
    pages_needed,
)

LAYERS = {"flash": (21, 21, 20), "pro": (30, 30, 31)}  # CSA, indexer, HCA
BATCH, STEPS = {"cpu": 8, "gpu": 64}, {"cpu": 256, "gpu": 512}  # defaults, by platform
MAX_TOKENS = 512  # a request's length is drawn from 1...MAX_TOKENS
ARRIVAL = 0.25  # probability that an empty slot gets a request, per step
VOCAB = 1009
# Checked, spread over the run: every layer of so many steps, and one layer of so many more.
FULL_STEPS, SAMPLED_STEPS = 16, 256
# Timing by kind: so many of the loop's steps in one program, it so often in a row, and that again.
REPLAYED_STEPS, RUNS, ROUNDS = 16, 4, 5


@dataclasses.dataclass(frozen=True)
class Kind:
    """The layers of one kind."""

    name: str
    head_dim: int
    compress_ratio: int
    layers: int

    @property
    def overlap(self) -> bool:
        """Whether a window reaches back over the one before it."""
        return _config.overlaps(self.compress_ratio)

    def first_needed(self, length: int) -> int:
        """The first token behind the windows that a sequence of this length has yet to complete."""
        return max(length // self.compress_ratio - self.overlap, 0) * self.compress_ratio


def kinds_of(model: str) -> tuple[Kind, ...]:
    """The compressor calls of one decode step of ``model``."""
    csa, indexer, hca = LAYERS[model]
    return Kind("CSA", 512, 4, csa), Kind("indexer", 128, 4, indexer), Kind("HCA", 512, 128, hca)


class PagePool:
    """The pages of one kind's states: a free list, and the block tables filled from it.

    The states of all layers of a kind are alike, so that one table serves them all. Pages that no
    step will read are not kept: the pool is as large as its slots need, however long a request.
    """

    def __init__(self, kind: Kind, options: argparse.Namespace):
        """All pages free."""
        self.kind, self.page_size, self.format = kind, options.page_size, options.state_format
        in_format = {"compress_ratio": kind.compress_ratio, "format": self.format}
        self.live_pages = functools.partial(live_pages, page_size=self.page_size, **in_format)
        self.num_pages = options.batch * pages_needed(
            self.page_size, next_n=options.next_n, **in_format
        )
        self.free = deque(range(self.num_pages))  # first in, first out: pages get well mixed
        self.tables = np.full((options.batch, -(-MAX_TOKENS // self.page_size)), -1, np.int32)

    def hold(self, slot: int, needed: Sequence[int]) -> None:
        """Let ``slot`` own the logical pages ``needed``, and no other."""
        table = self.tables[slot]
        for logical in np.flatnonzero(table >= 0):
            if logical not in needed:
                self.free.append(int(table[logical]))
                table[logical] = -1
        for logical in needed:
            if table[logical] < 0:
                table[logical] = self.free.popleft()

    def init_states(self) -> list[CompressorState]:
        """Those of the kind's layers, f32."""
        return [
            init_state(
                self.num_pages,
                self.page_size,
                head_dim=self.kind.head_dim,
                compress_ratio=self.kind.compress_ratio,
                format=self.format,
            )
            for _ in range(self.kind.layers)
        ]


@dataclasses.dataclass
class Request:
    """A sequence being decoded; ``tokens[:length]`` is accepted, the rest is still to come."""

    tokens: np.ndarray  # [target length] i32
    length: int = 0


class Plan(NamedTuple):
    """One step's operands, made on the host."""

    tokens: Any  # [B, next_n] i32
    kv_lens: Any  # [B] i32
    q_lens: Any  # [B] i32
    tables: dict[str, Any]  # by kind, [B, max_pages] i32


class Span(NamedTuple):
    """One request as it stood in one step."""

    slot: int
    length: int  # accepted before the step
    tokens: np.ndarray  # [kv_len] i32, with those of the step


class Scheduler:
    """Which request is in which slot, how long it is, and the pages it owns."""

    def __init__(
        self, kinds: Sequence[Kind], options: argparse.Namespace, rng: np.random.Generator
    ):
        """No requests yet."""
        self.rng, self.next_n, self.accept = rng, options.next_n, options.accept
        self.pools = {kind.name: PagePool(kind, options) for kind in kinds}
        self.requests: list[Request | None] = [None] * options.batch
        self.started = self.finished = self.accepted = self.rejected = 0

    def plan(self, *, arrivals: bool = True) -> Plan:
        """The next step: arrivals, the tokens to try, and pages for them."""
        batch = len(self.requests)
        tokens = self.rng.integers(VOCAB, size=(batch, self.next_n), dtype=np.int32)
        kv_lens, q_lens = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        for slot, request in enumerate(self.requests):
            if request is None:
                if not arrivals or self.rng.random() >= ARRIVAL:
                    continue
                target = self.rng.integers(1, MAX_TOKENS + 1)
                request = self.requests[slot] = Request(np.zeros(target, np.int32))
                self.started += 1
            n = min(self.next_n, len(request.tokens) - request.length)  # ragged in its last step
            end = request.length + n
            request.tokens[request.length : end] = tokens[slot, :n]
            kv_lens[slot], q_lens[slot] = end, n
            for pool in self.pools.values():
                pool.hold(slot, pool.live_pages(request.length, next_n=n))
        # Copies, for JAX may read a NumPy operand after the call has returned.
        tables = {name: pool.tables.copy() for name, pool in self.pools.items()}
        return Plan(tokens, kv_lens, q_lens, tables)

    def spans(self, plan: Plan) -> list[Span]:
        """What the check needs to know of the step just planned."""
        return [
            Span(slot, request.length, request.tokens[: plan.kv_lens[slot]].copy())
            for slot, request in enumerate(self.requests)
            if request is not None
        ]

    def settle(self, plan: Plan) -> None:
        """Accept a prefix of each request's drafts; the next step overwrites the others' rows."""
        for slot, request in enumerate(self.requests):
            if request is None:
                continue
            n = int(plan.q_lens[slot])
            rejected = np.flatnonzero(self.rng.random(n - 1) >= self.accept)
            taken = 1 + int(rejected[0]) if rejected.size else n
            request.length += taken
            self.accepted += taken
            self.rejected += n - taken
            if request.length == len(request.tokens):
                self.requests[slot] = None
                self.finished += 1
                for pool in self.pools.values():
                    pool.hold(slot, ())


class Weights(NamedTuple):
    """What stands for the model in front of one kind's compressors.

    A token's projection is a row of one table per kind, picked by token and layer. Gathering costs
    little; every call still gets an operand of its own (one array shared by all layers would stay
    in the cache), and the host finds the same rows for the check.
    """

    projections: Any  # [VOCAB, 2 S] bf16
    apes: Sequence[Any]  # of each layer, [R, S] f32


def random_weights(kind: Kind, rng: np.random.Generator) -> Weights:
    """Normally distributed, on the host."""
    state_dim = kind.head_dim * (1 + kind.overlap)
    projections = rng.standard_normal((VOCAB, 2 * state_dim), np.float32)
    apes = rng.standard_normal((kind.layers, kind.compress_ratio, state_dim), np.float32)
    return Weights(projections.astype(jnp.bfloat16), list(apes))


def project(weights: Weights, tokens: Any, layer: int) -> Any:
    """kv_score of ``tokens`` at this layer, on the host or on the device."""
    return weights.projections[(tokens + 97 * layer) % VOCAB]


def compress_layers(
    kind: Kind,
    states: list[CompressorState],
    kv_scores: list[Array],
    apes: Sequence[Array],
    plan: Plan,
    implementation: str | None,
) -> tuple[list[Array], list[CompressorState]]:
    """The calls of one kind in one step -> (kv_comps, states), by layer.

    An unrolled loop over a list of states, each updated in place: a ``lax.scan`` would cost several
    microseconds per layer, and states stacked in one array a copy.
    """
    results = [
        paged_kv_compress(
            kv_score,
            ape,
            state,
            plan.tables[kind.name],
            plan.kv_lens,
            compress_ratio=kind.compress_ratio,
            q_lens=plan.q_lens,
            implementation=implementation,
        )
        for kv_score, ape, state in zip(kv_scores, apes, states, strict=True)
    ]
    return [kv_comp for kv_comp, _ in results], [state for _, state in results]


def make_step(kinds: Sequence[Kind], implementation: str | None) -> Callable[..., Any]:
    """``(states, weights, plan) -> (kv_comps, states)``: by kind, then by layer."""

    def step(states, weights, plan):
        kv_comps, states = {}, dict(states)
        for kind in kinds:
            name, of_kind = kind.name, weights[kind.name]
            kv_scores = [project(of_kind, plan.tokens, layer) for layer in range(kind.layers)]
            kv_comps[name], states[name] = compress_layers(
                kind, states[name], kv_scores, of_kind.apes, plan, implementation
            )
        return kv_comps, states

    return jax.jit(step, donate_argnums=0)


def seconds_per_call(
    kind: Kind,
    states: list[CompressorState],
    weights: Weights,
    plans: Sequence[Plan],
    implementation: str | None,
) -> float:
    """Time of a program with all of a kind's calls in ``plans``, by the number of calls.

    The program is long and runs several times in a row, so that starting it hardly counts; it has
    no projections, and returns only the states. The layer changes from call to call and the rows
    from plan to plan, so that a state is as cold as its size makes it; but no other kind's calls
    come between, as in a step.
    """

    def replay(states, kv_scores, apes, plans):
        for plan in plans:
            _, states = compress_layers(kind, states, kv_scores, apes, plan, implementation)
        return states

    program = jax.jit(replay, donate_argnums=0)
    kv_scores = [project(weights, plans[0].tokens, layer) for layer in range(kind.layers)]
    operands = jax.device_put((kv_scores, weights.apes, plans))
    times = []
    for _ in range(1 + ROUNDS):  # the first one compiles
        jax.block_until_ready((states, operands))
        start = time.perf_counter()
        for _ in range(RUNS):
            states = program(states, *operands)
        jax.block_until_ready(states)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / (RUNS * len(plans) * kind.layers)


class Sample(NamedTuple):
    """What one call emitted, kept for the check."""

    layer: int
    kv_comp: Array  # [B, M, D]
    spans: list[Span]


def compress_float64(kind: Kind, layer: int, weights: Weights, span: Span) -> np.ndarray:
    """[windows completed, D]: what a request's step should emit, from the log of its tokens."""
    ratio, first = kind.compress_ratio, kind.first_needed(span.length)
    rows = project(weights, span.tokens[first:], layer).astype(np.float32)
    kv, score = np.split(rows, 2, axis=1)
    bias = weights.apes[layer][np.arange(first, len(span.tokens)) % ratio]
    score = score + bias  # in f32: as stored
    values = []
    for window in range(span.length // ratio, len(span.tokens) // ratio):
        start = window * ratio - first
        parts = [(slice(start, start + ratio), slice(-kind.head_dim, None))]
        if kind.overlap and window > 0:
            parts.append((slice(start - ratio, start), slice(kind.head_dim)))
        scores = np.concatenate([score[part] for part in parts]).astype(np.float64)
        exps = np.exp(scores - scores.max(0))
        values.append((exps * np.concatenate([kv[p] for p in parts])).sum(0) / exps.sum(0))
    return np.reshape(values, (-1, kind.head_dim))


def errors_of(sample: Sample, kind: Kind, weights: Weights) -> list[float]:
    """The largest error of each completed window, in bf16 ulps of the float64 value.

    An ulp is at least 2^-20: below that, f32 sums of numbers near 1 have no correct digits. Rows
    that hold no window must be zero; else there is one more error, infinite.
    """
    kv_comp, errors = np.asarray(sample.kv_comp).astype(np.float64), []
    for span in sample.spans:
        want = compress_float64(kind, sample.layer, weights, span)
        got = kv_comp[span.slot, : len(want)]
        ulp = np.exp2(np.maximum(np.frexp(want)[1] - 8, -20))
        errors += list(np.max(np.abs(got - want) / ulp, axis=1))
        kv_comp[span.slot, : len(want)] = 0
    return errors + [np.inf] * bool(np.any(kv_comp != 0))


def show_progress(done: int, total: int) -> None:
    """A bar on stderr; a line per quarter where that is not a terminal."""
    text = f"decoding {done}/{total}"
    if sys.stderr.isatty():
        bar, end = "#" * (30 * done // total), "\n" if done == total else ""
        print(f"\r[{bar:.<30}] {text}", end=end, file=sys.stderr, flush=True)
    elif 4 * done // total != 4 * (done - 1) // total:
        print(text, file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> bool:
    """Decode, time, check and report; whether all that was compared is right."""
    kinds = kinds_of(options.model)
    implementation = None if options.implementation == "auto" else options.implementation
    rng = np.random.default_rng(options.seed)
    scheduler = Scheduler(kinds, options, rng)
    host_weights = {kind.name: random_weights(kind, rng) for kind in kinds}
    weights = jax.device_put(host_weights)
    states = {name: pool.init_states() for name, pool in scheduler.pools.items()}
    state_bytes = {
        name: sum(x.nbytes for x in jax.tree.leaves(of_kind)) for name, of_kind in states.items()
    }
    step = make_step(kinds, implementation)
    print("compiling", file=sys.stderr, flush=True)
    no_request = scheduler.plan(arrivals=False)  # a step of inactive slots changes nothing
    kv_comps, states = jax.block_until_ready(step(states, weights, no_request))

    plans: list[Plan] = []
    samples: dict[str, list[Sample]] = {kind.name: [] for kind in kinds}
    every_layer = -(-options.steps // FULL_STEPS)
    one_layer = -(-options.steps // SAMPLED_STEPS)
    replay_every = -(-options.steps // REPLAYED_STEPS)
    start = time.perf_counter()
    for index in range(options.steps):
        plan = scheduler.plan()  # while the device still works on the step before
        jax.block_until_ready(kv_comps)
        kv_comps, states = step(states, weights, plan)
        for kind in kinds:
            layers = range(kind.layers) if index % every_layer == every_layer // 2 else ()
            if index % one_layer == 0 and not layers:
                layers = (int(rng.integers(kind.layers)),)
            samples[kind.name] += [
                Sample(layer, kv_comps[kind.name][layer], scheduler.spans(plan)) for layer in layers
            ]
        if index % replay_every == replay_every // 2:
            plans.append(plan)
        scheduler.settle(plan)
        show_progress(index + 1, options.steps)
    jax.block_until_ready(kv_comps)
    seconds = time.perf_counter() - start

    print(
        f"requests: {scheduler.started} started, {scheduler.finished} finished; "
        f"drafts rejected: {scheduler.rejected}\n"
        f"tokens/s: {scheduler.accepted / seconds:,.0f} ({scheduler.accepted} accepted in "
        f"{seconds:.2f} s; {seconds / options.steps * 1e3:.2f} ms per step, with scheduling and "
        "projections)",
        flush=True,
    )
    # The programs that replay several steps would compile for minutes in plain jnp.
    replayed = plans[:2] if implementation == "xla" else plans
    print("timing each kind of call", file=sys.stderr, flush=True)
    per_call = {
        k.name: seconds_per_call(k, states[k.name], weights[k.name], replayed, implementation)
        for k in kinds
    }
    report_calls(kinds, per_call, state_bytes, len(replayed))
    print("checking", file=sys.stderr, flush=True)
    return report_check(kinds, samples, host_weights)


def report_calls(
    kinds: Sequence[Kind], per_call: dict[str, float], state_bytes: dict[str, int], replayed: int
) -> None:
    """Print what each kind of call costs."""
    total = sum(kind.layers * per_call[kind.name] for kind in kinds)
    print(f"\n{'kind':8} {'calls/step':>10} {'us/call':>9} {'time':>7} {'state bytes':>15}")
    for kind in kinds:
        seconds, size = per_call[kind.name], state_bytes[kind.name]
        share = kind.layers * seconds / total
        print(f"{kind.name:8} {kind.layers:10} {seconds * 1e6:9.2f} {share:7.1%} {size:15,}")
    calls, size = sum(kind.layers for kind in kinds), sum(state_bytes.values())
    print(
        f"{'all':8} {calls:10} {total / calls * 1e6:9.2f} {1:7.1%} {size:15,}\n"
        f"us/call: one kind at a time, the calls of {replayed} of the steps in one program without "
        f"projections,\n{RUNS} times in a row: median of {ROUNDS} rounds, by the number of calls. "
        f"What fits in the cache is found there.\nAll kinds: {total * 1e3:.3f} ms per step.\n"
    )


def report_check(
    kinds: Sequence[Kind], samples: dict[str, list[Sample]], weights: dict[str, Weights]
) -> bool:
    """Compare the samples with float64 and print the verdict; False for a mismatch."""
    errors = {
        kind.name: [
            error
            for sample in samples[kind.name]
            for error in errors_of(sample, kind, weights[kind.name])
        ]
        for kind in kinds
    }
    largest = np.max(np.concatenate(list(errors.values())), initial=0)
    counts = ", ".join(f"{name} {len(of_kind)}" for name, of_kind in errors.items())
    correct = bool(largest <= 1)  # not so for NaN
    verdict = "OK" if all(errors.values()) else "INCOMPLETE (more --steps needed)"
    if not correct:
        verdict = "MISMATCH"
    print(
        f"check: {verdict}, {sum(map(len, errors.values()))} windows compared with float64 "
        f"({counts}), max error {largest:.3f} bf16 ulp (allowed: 1)"
    )
    return correct


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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; default batch and steps are what the platform has time for."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_dsv4",
        description="Continuous-batching decode with all compressor calls of a DeepSeek-V4 model: "
        "requests arrive, are decoded with drafts of which some are rejected, and finish. "
        "Compares emitted values with float64; reports speed and memory.",
        epilog="Exit status: 0; 1 if an emitted value is wrong; 2 for a wrong option.",
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
        "--implementation",
        choices=("auto", "ffi", "xla"),
        default="auto",
        help="ffi: the compiled kernels; xla: the jnp reference; auto (default): the compiled "
        "kernels where there are any",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the main job; the exit status."""
    options = parse(arguments)
    print(
        f"DeepSeek-V4-{options.model.capitalize()}, compressor calls only: batch {options.batch}, "
        f"next_n {options.next_n}, {options.steps} steps, accept {options.accept}\n"
        f"on {jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"implementation {options.implementation}, {options.state_format} f32 state, "
        f"page size {options.page_size}, seed {options.seed}",
        flush=True,
    )
    if jax.default_backend() == "cpu":
        sizes = f"batch {BATCH['gpu']}, {STEPS['gpu']} steps"
        print(f"the defaults are small on a CPU; on a GPU they are {sizes}", flush=True)
    try:
        return 0 if run(options) else 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
