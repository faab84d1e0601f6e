"""The server's side: requests, their pages, and one step after the other.

A request is a list of tokens, of which the first ``length`` have gone through the model. Each step
brings some of the rest: a chunk of a prompt; or the last token, whose successor is not known yet,
and drafts of what may follow. So prompts, decode steps and what was preempted are one case.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples.engine.model import (
    CSA,
    HCA,
    Batch,
    Caches,
    Config,
    Sizes,
    Tables,
    Weights,
    forward,
    init_caches,
)
from jax_dsv4 import OutOfPages, PagePool, live, pages_needed

Draft = Callable[[Sequence[int], int], Sequence[int]]  # (tokens so far, the most) -> guesses


def no_draft(tokens: Sequence[int], most: int) -> Sequence[int]:
    """No guesses: one token a step."""
    return ()


def look_up(tokens: Sequence[int], most: int, *, ngram: int = 2) -> Sequence[int]:
    """Prompt lookup: what came after the last tokens when they were last seen."""
    key = list(tokens[-ngram:])
    for end in range(len(tokens) - 1, ngram - 1, -1):
        if list(tokens[end - ngram : end]) == key:
            return tokens[end : end + most]
    return ()


def as_integer(name: str, value: Any) -> int:
    """An integer, NumPy's too, as Python's, which does not wrap around."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from error


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt, and what follows it."""

    tokens: list[int]  # the prompt, and all that is known behind it
    prompt: int  # length of the prompt
    max_tokens: int  # how many shall follow
    length: int = 0  # tokens whose rows and records are in the caches
    slot: int | None = None  # of the batch, while it runs
    status: str = "waiting"  # then "running", and "finished", "cancelled" or "failed"
    error: str = ""  # why it failed
    reused: int = 0  # tokens of the cached prefix that it began behind when it was last let in
    preempted: int = 0  # how often it had to give its pages back
    arrival: float = 0.0
    first_token: float = 0.0
    logits: list[np.ndarray] | None = None  # those that gave each new token, where they are kept

    @property
    def output(self) -> list[int]:
        """The new tokens so far."""
        return self.tokens[self.prompt :]

    @property
    def done(self) -> bool:
        """Whether nothing will follow any more."""
        return self.status in ("finished", "cancelled", "failed")


class Options(NamedTuple):
    """What an engine is compiled for."""

    batch: int = 4  # requests that run at a time, per group
    max_len: int = 512  # tokens of the longest request
    chunk: int = 128  # the most rows of prompts per step, per group
    drafts: int = 0  # the most that are verified per request and step
    resume_every: int = 128  # cached prefixes end at multiples of it; a multiple of page_tokens
    prefixes: int = 4  # cached at a time, per group
    page_tokens: int = 128  # a multiple of 128, so that a page holds whole records
    state_rows: int = 8  # of a page of a state
    pool_tokens: int | None = None  # that pages are there for; None: batch requests of max_len
    state_format: str = "raw"
    record_formats: tuple[str, str] = ("f32", "f32")  # of main compressors, and of indexers
    dtype: Any = jnp.float32  # of the sliding window's rows
    eos: int | None = None
    implementation: str | None = None

    @property
    def buckets(self) -> list[int]:
        """Rows of the steps with prompts: for few of them, and for a chunk; all others decode."""
        decoding = self.batch * self.next_n
        return [few + decoding for few in (self.chunk // 8, self.chunk) if few >= 16] or [
            self.chunk + decoding
        ]

    @property
    def next_n(self) -> int:
        """The most rows of a request that decodes."""
        return 1 + self.drafts

    def sizes(self) -> Sizes:
        """Pages of the caches: of states few, and one for each end of a prefix."""
        longest = -(-self.max_len // self.page_tokens) * self.page_tokens  # on pages of its own
        tokens = self.batch * longest if self.pool_tokens is None else self.pool_tokens
        slots = self.batch + self.prefixes

        def state_pages(ratio: int) -> int:
            kind: dict[str, Any] = {"compress_ratio": ratio, "format": self.state_format}
            one, step = (pages_needed(self.state_rows, next_n=n, **kind) for n in (1, self.next_n))
            # Windows of R 4 overlap: at the end of a prefix, those of a window are still needed.
            ends = tokens // self.resume_every * -(-CSA // self.state_rows)
            return slots * one + self.batch * step + ends

        pages = -(-tokens // self.page_tokens)
        return Sizes(
            self.page_tokens, self.state_rows, pages, state_pages(CSA), state_pages(HCA), pages
        )


DEFAULTS = Options()
LEAST = {  # of the numbers among them
    "batch": 1,
    "max_len": 2,  # a token, and one that follows
    "chunk": 1,
    "drafts": 0,
    "resume_every": 1,
    "prefixes": 0,
    "page_tokens": 1,
    "state_rows": 1,
    "pool_tokens": 1,
}


class Pages:
    """The pages of a group's requests: four pools that hold, share and release together."""

    def __init__(self, options: Options):
        """All pages are free."""
        self.options, sizes = options, options.sizes()

        def make(num_pages: int, page_size: int, ratio: int, **kind: Any) -> PagePool:
            kind = {"resume_every": options.resume_every} | kind
            slots, max_pages = options.batch + options.prefixes, -(-options.max_len // page_size)
            return PagePool(
                num_pages, slots, max_pages, page_size=page_size, compress_ratio=ratio, **kind
            )

        self.states = [
            make(pages, sizes.state_rows, ratio, format=options.state_format)
            for pages, ratio in ((sizes.csa_pages, CSA), (sizes.hca_pages, HCA))
        ]
        # A step reads the window's rows before its own: to a pool, a window of 128 that overlaps.
        self.window = make(sizes.window_pages, sizes.page_tokens, 128, overlap=True)
        # Of a request that may be resumed at the end of every page, all pages stay.
        self.records = make(
            sizes.record_pages, sizes.page_tokens, CSA, resume_every=sizes.page_tokens
        )
        self.all = (self.window, *self.states, self.records)

    def hold(self, slot: int, length: int, n: int, *, decodes: bool) -> None:
        """Pages for a step of ``n`` rows. After ``OutOfPages`` some of them are there."""
        for name, pool in zip(Tables._fields, self.all, strict=True):
            # What stores live rows only, and so needs pages for no others, is ragged_records.
            only_live = pool in self.states and not decodes
            try:
                pool.hold(slot, length, n, self.options.drafts if only_live else None)
            except OutOfPages as error:
                raise OutOfPages(f"{name}: {error}") from error

    def share(self, slot: int, source: int, length: int) -> None:
        """A slot's request begins with another's first ``length`` tokens."""
        for pool in self.all:
            pool.share(slot, source, length)

    def release(self, slot: int) -> None:
        """Give back all pages of a slot."""
        for pool in self.all:
            pool.release(slot)

    def tables(self) -> Tables:
        """The block tables of the batch."""
        return Tables(*(pool.tables[: self.options.batch] for pool in self.all))

    def in_use(self) -> int:
        """Pages that are not free."""
        return sum(pool.num_pages - pool.num_free for pool in self.all)


class Prefix(NamedTuple):
    """Tokens whose pages stay for other requests, in a slot that takes part in no step."""

    slot: int
    tokens: list[int]


class Part(NamedTuple):
    """What a request brings to a step."""

    request: Request
    slot: int
    tokens: list[int]
    drafts: int  # how many of them, at the end

    def without_drafts(self) -> Part:
        """The same, but for them."""
        known = self.tokens[: len(self.tokens) - self.drafts]
        return self._replace(tokens=known, drafts=0)


class Group:
    """The requests that share caches: who runs, who brings what, and who has which pages."""

    def __init__(self, options: Options, draft: Draft):
        """Nobody runs."""
        self.options, self.draft = options, draft
        self.pages = Pages(options)
        self.running: list[Request] = []  # oldest first
        self.prefixes: list[Prefix] = []  # least recently used first
        self.full = False  # a request was preempted: none is let in before one has left

    # Who runs.

    def admit(self, request: Request) -> bool:
        """Let a request in, if there are a slot and pages for its first chunk."""
        options = self.options
        used = {r.slot for r in self.running}
        free = [slot for slot in range(options.batch) if slot not in used]
        if not free or (self.full and self.running):
            return False
        prefix, length = self._find_prefix(request)
        request.slot, request.length = free[0], length
        if prefix:
            self.pages.share(request.slot, prefix.slot, length)
        n = min(len(request.tokens) - request.length, options.chunk)
        while True:
            try:
                self.pages.hold(request.slot, request.length, n, decodes=False)
            except OutOfPages as error:
                if self._drop_prefix(keep=prefix):
                    continue
                self._give_back(request, "waiting")
                if not self.running:  # nobody whose pages it could wait for
                    if prefix:  # but those of its own prefix's other tokens
                        self._drop_prefix()
                        return False
                    request.status, request.error = "failed", f"larger than the pools: {error}"
                    return True
                return False
            request.status, request.reused = "running", length
            self.running.append(request)
            return True

    def _give_back(self, request: Request, status: str) -> None:
        if request.slot is not None:
            self.pages.release(request.slot)
        request.slot, request.status = None, status

    def leave(self, request: Request, status: str) -> None:
        """A request has finished, or was cancelled: its pages are free at once."""
        self.running.remove(request)
        self._give_back(request, status)
        self.full = False

    # What a step brings.

    def choose(self) -> list[Part]:
        """All that decodes, and chunks of prompts as there is room, oldest first."""
        parts, room = [], self.options.chunk
        for request in self.running:
            assert request.slot is not None
            rest = request.tokens[request.length :]
            if len(rest) > 1:
                rest = rest[:room]
                room -= len(rest)
                drafts: Sequence[int] = ()
            else:
                left = request.max_tokens - len(request.output) - 1
                most = min(self.options.drafts, left)
                drafts = list(self.draft(request.tokens, most))[: max(most, 0)] if most else ()
            if rest:
                parts.append(Part(request, request.slot, [*rest, *drafts], len(drafts)))
        return parts

    def hold(self, parts: list[Part], *, decodes: bool) -> tuple[list[Part], list[Request]]:
        """Pages for them: (those that have some, requests that must wait for others' to leave).

        Where none are left, a cached prefix goes; then a request's own drafts; then the youngest
        request, which will bring all of its tokens again. The oldest one always gets on.
        """
        held: list[Part] = []
        preempted: list[Request] = []
        for part in parts:
            request = part.request
            while request.slot is not None:
                try:
                    self.pages.hold(part.slot, request.length, len(part.tokens), decodes=decodes)
                    held.append(part)
                    break
                except OutOfPages as error:
                    if self._drop_prefix():
                        continue
                    if part.drafts:
                        part = part.without_drafts()
                        continue
                    youngest = self.running.pop()
                    if youngest is request and not self.running:
                        self._give_back(request, "failed")
                        request.error = f"larger than the pools: {error}"
                        break
                    self._give_back(youngest, "waiting")
                    youngest.preempted += 1
                    preempted.append(youngest)
                    self.full = True
        return [part for part in held if part.request.slot is not None], preempted

    def make_batch(self, parts: list[Part], shape: tuple[int, ...]) -> Batch:
        """The step's operands: ``shape`` [B, next_n] where all decode, and [T] otherwise."""
        batch = self.options.batch
        tokens = np.zeros(shape, np.int32)
        kv_lens, q_lens = np.zeros((2, batch), np.int32)
        for part in parts:
            kv_lens[part.slot] = part.request.length + len(part.tokens)
            q_lens[part.slot] = len(part.tokens)
        cu_q_lens = None
        if len(shape) == 1:
            cu_q_lens = np.append(0, q_lens.cumsum()).astype(np.int32)
        for part in parts:
            n = len(part.tokens)
            if cu_q_lens is None:
                tokens[part.slot, :n] = part.tokens
            else:
                tokens[cu_q_lens[part.slot] : cu_q_lens[part.slot] + n] = part.tokens
        return Batch(tokens, kv_lens, q_lens, cu_q_lens, self.pages.tables())

    # What came of it.

    def settle(
        self, parts: list[Part], chosen: np.ndarray, logits: Any
    ) -> dict[Request, list[int]]:
        """The new tokens of each request: of drafts those that are what the model chose.

        Those that are not need nothing: the next step writes their rows again, and nobody sees
        their records, since a query sees the records of complete windows only.
        """
        new: dict[Request, list[int]] = {}
        for part in parts:
            request = part.request
            if request.status != "running" or request.slot != part.slot:  # it was cancelled
                continue
            known = len(part.tokens) - part.drafts
            through = request.length < request.prompt <= request.length + known
            request.length += known
            if request.length == len(request.tokens):
                new[request] = self._accept(part, chosen[part.slot], logits)
            if request.length >= request.prompt:
                self._cache_prefix(request, evict=through)
            if len(request.output) >= request.max_tokens or (
                self.options.eos is not None and self.options.eos in new.get(request, ())
            ):
                self.leave(request, "finished")
        return new

    def _accept(self, part: Part, chosen: np.ndarray, logits: Any) -> list[int]:
        request, drafts = part.request, part.tokens[len(part.tokens) - part.drafts :]
        first, accepted = len(chosen) - part.drafts - 1, []
        for i, token in enumerate(chosen[first:].tolist()):
            accepted.append(token)
            if i == len(drafts) or drafts[i] != token or token == self.options.eos:
                break
        request.length += len(accepted) - 1
        request.tokens += accepted
        request.first_token = request.first_token or time.perf_counter()
        if request.logits is not None:
            request.logits += list(logits[part.slot, first : first + len(accepted)])
        return accepted

    # Prefixes.

    def _find_prefix(self, request: Request) -> tuple[Prefix | None, int]:
        """The cached prefix with the most tokens in common, up to where it can be resumed."""
        best, most, every = None, 0, self.options.resume_every
        for prefix in self.prefixes:
            common, end = 0, min(len(prefix.tokens), len(request.tokens) - 1)
            while common + every <= end and (
                prefix.tokens[common : common + every] == request.tokens[common : common + every]
            ):
                common += every
            if common > most:
                best, most = prefix, common
        if best:
            self.prefixes.remove(best)
            self.prefixes.append(best)
        return best, most

    def _cache_prefix(self, request: Request, *, evict: bool) -> None:
        """Keep the pages of a prompt for requests that begin with it.

        ``evict``: in place of the least recently used one, where there are as many as there may be.
        Only the step that completes a prompt may do so: else prompts that run would evict each
        other's at every step.
        """
        every = self.options.resume_every
        tokens = request.tokens[: request.prompt // every * every]
        assert request.slot is not None
        if not tokens or any(prefix.tokens[: len(tokens)] == tokens for prefix in self.prefixes):
            return
        if len(self.prefixes) == self.options.prefixes and not (evict and self._drop_prefix()):
            return
        first, used = self.options.batch, {prefix.slot for prefix in self.prefixes}
        slot = next(s for s in range(first, first + self.options.prefixes) if s not in used)
        self.pages.share(slot, request.slot, len(tokens))
        self.prefixes.append(Prefix(slot, tokens))

    def _drop_prefix(self, keep: Prefix | None = None) -> bool:
        """Let go of the least recently used prefix, if there is one."""
        for prefix in self.prefixes:
            if prefix is not keep:
                self.pages.release(prefix.slot)
                self.prefixes.remove(prefix)
                return True
        return False

    def drop_prefixes(self) -> None:
        """Let go of all of them."""
        while self._drop_prefix():
            pass


@dataclasses.dataclass
class Stats:
    """Of steps that are ragged, because of prompts, and of those in which all requests decode."""

    steps: int = 0
    prompt_tokens: int = 0  # rows, with those that decode beside prompts
    prompt_seconds: float = 0.0
    decode_tokens: int = 0  # new ones
    decode_seconds: float = 0.0
    drafts: int = 0
    accepted: int = 0


def name_step(batch: Batch) -> str:
    """By its kind and the shape of its tokens."""
    kind = "decode" if batch.cu_q_lens is None else "prompts"
    return f"{kind}_{'x'.join(map(str, batch.tokens.shape))}"


class Engine:
    """Continuous batching on one device, or on ``groups`` of them with the same weights."""

    def __init__(
        self,
        config: Config,
        params: Weights,
        options: Options = DEFAULTS,
        *,
        draft: Draft = no_draft,
        groups: int | None = None,
    ):
        """Compile nothing yet: ``warm_up`` does, or the first step of each shape.

        Raises:
          ValueError, TypeError: an option is out of range or no integer; the text names it.
        """
        numbers = options._asdict() | {"groups": groups}
        for name, least in (LEAST | {"groups": 1}).items():
            if name in ("pool_tokens", "groups") and numbers[name] is None:
                continue
            if as_integer(name, numbers[name]) < least:
                raise ValueError(f"{name}: expected at least {least}, got {numbers[name]}")
        if options.page_tokens % HCA or options.resume_every % options.page_tokens:
            raise ValueError(
                "page_tokens, resume_every: expected a multiple of 128, and a multiple of that, "
                f"got {options.page_tokens} and {options.resume_every}"
            )
        if config.sliding_window > 128:
            raise ValueError(f"sliding_window: expected at most 128, got {config.sliding_window}")
        tables = min(len(params[f"cos_sin.{name}"]) for name in ("main", "compress"))
        if options.max_len > tables:
            raise ValueError(
                f"max_len: expected at most {tables}, as the weights' tables have, "
                f"got {options.max_len}"
            )
        if groups is not None and groups > jax.device_count():
            raise ValueError(
                f"groups: expected at most {jax.device_count()}, as there are devices, got {groups}"
            )
        self.config, self.options = config, options
        self.groups = [Group(options, draft) for _ in range(groups or 1)]
        self.waiting: collections.deque[Request] = collections.deque()
        self.stats = Stats()
        self.programs: dict[tuple[int, ...], Any] = {}  # compiled, by the shape of their tokens
        self.examples: dict[tuple[int, ...], Batch] = {}  # the last one of each

        def init(_: Any) -> Caches:
            return init_caches(
                config,
                options.sizes(),
                dtype=options.dtype,
                state_format=options.state_format,
                record_formats=options.record_formats,
            )

        try:
            jax.eval_shape(init, None)
        except ValueError as error:
            raise ValueError(f"state_format, record_formats: {error}") from error
        self.mesh = None if groups is None else jax.make_mesh((groups,), ("data",))
        if self.mesh is None:
            self.params, self.caches = params, init(None)
        else:
            self.params = jax.device_put(params, NamedSharding(self.mesh, P()))
            split = NamedSharding(self.mesh, P("data"))
            self.caches = jax.jit(jax.vmap(init), out_shardings=split)(jnp.arange(groups or 1))

    def compile(self, batch: Batch, **changes: Any) -> Any:
        """The step for batches of this shape, compiled; ``changes`` to ``forward``'s options."""
        options = self.options
        given = {
            "page_tokens": options.page_tokens,
            "next_n": options.next_n,
            "store_rows": live(max_rewind=options.drafts, resume_every=options.resume_every),
            "implementation": options.implementation,
        }

        def step(params: Weights, caches: Caches, batch: Batch) -> tuple[Caches, Array, Array]:
            return forward(self.config, params, caches, batch, **given | changes)

        def of_a_device(params: Weights, *of_groups: Any) -> Any:
            # vmap, not a reshape: XLA would copy what is reshaped around a call that updates it.
            return jax.vmap(step)(jax.tree.map(lambda x: x[None], params), *of_groups)

        run = step
        if self.mesh is not None:
            # A device works on its own group: page ids are local to it, and nothing is sent.
            split = P("data")
            specs = {"in_specs": (P(), split, split), "out_specs": split}
            run = jax.shard_map(of_a_device, mesh=self.mesh, **specs)
        run.__name__ = name_step(batch)  # profiles show it
        program = jax.jit(run, donate_argnums=1)
        return program.lower(self.params, self.caches, batch).compile()

    def submit(self, prompt: Sequence[int], max_tokens: int, *, logits: bool = False) -> Request:
        """A new request; it waits until there is a slot and pages for it.

        For the thread that calls ``step``: other threads hand prompts over to it, in a queue.

        Raises:
          ValueError: the prompt is empty, has a token outside the vocabulary, or is too long; or
            no token shall follow.
          TypeError: a token, or ``max_tokens``, is no integer.
        """
        tokens = [as_integer("prompt", token) for token in prompt]
        if not tokens:
            raise ValueError("prompt: expected at least one token, got none")
        for token in tokens:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"prompt: expected tokens in 0...{self.config.vocab_size - 1}, got {token}"
                )
        max_tokens = as_integer("max_tokens", max_tokens)
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
        if len(tokens) + max_tokens > self.options.max_len:
            raise ValueError(
                f"prompt: expected at most {self.options.max_len} tokens (max_len) with those to "
                f"come, got {len(tokens)} + {max_tokens}"
            )
        request = Request(tokens, len(tokens), max_tokens, logits=[] if logits else None)
        request.arrival = time.perf_counter()
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Drop a request at any time; what a step under way brings for it is not looked at.

        For the thread that calls ``step``, as ``submit``.
        """
        if request in self.waiting:
            self.waiting.remove(request)
            request.status = "cancelled"
        for group in self.groups:
            if request in group.running:
                group.leave(request, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting) or any(group.running for group in self.groups)

    def _admit(self) -> None:
        while self.waiting:
            groups = sorted(self.groups, key=lambda group: len(group.running))
            if not any(group.admit(self.waiting[0]) for group in groups):
                return
            self.waiting.popleft()

    def plan(self) -> tuple[list[list[Part]], Batch | None]:
        """Who brings what, and the step's operands; ``None`` if nobody brings anything."""
        self._admit()
        chosen = [group.choose() for group in self.groups]
        sizes = [len(part.tokens) for parts in chosen for part in parts]
        if not sizes:
            return chosen, None
        options, decodes = self.options, max(sizes) <= self.options.next_n
        if decodes:
            shape = options.batch, 1 if max(sizes) == 1 else options.next_n
        else:
            most = max(sum(len(part.tokens) for part in parts) for parts in chosen)
            shape = (next(bucket for bucket in options.buckets if bucket >= most),)
        held, batches = [], []
        for group, parts in zip(self.groups, chosen, strict=True):
            parts, preempted = group.hold(parts, decodes=decodes)
            self.waiting.extendleft(preempted)  # the youngest came first: the oldest is in front
            held.append(parts)
            batches.append(group.make_batch(parts, shape))
        return held, self._stack(batches)

    def warm_up(self) -> None:
        """Compile the steps of all shapes, so that no request waits for that."""
        options = self.options
        decoding = [(options.batch, n) for n in sorted({1, options.next_n})]
        for shape in [*decoding, *((rows,) for rows in options.buckets)]:
            batches = [group.make_batch([], shape) for group in self.groups]
            self.execute(self._stack(batches))

    def step(self) -> dict[Request, list[int]]:
        """One step; the new tokens of each request that got some."""
        start = time.perf_counter()
        held, batch = self.plan()
        if batch is None or not any(held):
            return {}
        new = self.settle(held, *self.execute(batch))
        seconds, stats = time.perf_counter() - start, self.stats
        stats.steps += 1
        if batch.cu_q_lens is None:
            stats.decode_seconds += seconds
            stats.decode_tokens += sum(map(len, new.values()))
        else:
            stats.prompt_seconds += seconds
            stats.prompt_tokens += sum(len(part.tokens) for parts in held for part in parts)
        return new

    def execute(self, batch: Batch) -> tuple[Array, Array]:
        """The device's part of a step: ``(tokens, logits)``, as ``forward`` gives them."""
        self.caches, chosen, logits = self.program(batch)(self.params, self.caches, batch)
        self.examples[batch.tokens.shape] = batch
        return chosen, logits

    def program(self, batch: Batch) -> Any:
        """The compiled step for batches of this shape."""
        shape = batch.tokens.shape
        if shape not in self.programs:
            self.programs[shape] = self.compile(batch)
        return self.programs[shape]

    def _stack(self, batches: list[Batch]) -> Batch:
        if self.mesh is None:
            return batches[0]
        stacked = jax.tree.map(lambda *parts: np.stack(parts), *batches)
        return jax.device_put(stacked, NamedSharding(self.mesh, P("data")))

    def settle(self, held: list[list[Part]], chosen: Any, logits: Any) -> dict[Request, list[int]]:
        """What came of a step."""
        new: dict[Request, list[int]] = {}
        shape = (len(self.groups), self.options.batch, self.options.next_n)
        wanted = any(part.request.logits is not None for parts in held for part in parts)
        chosen = np.asarray(chosen).reshape(shape)
        logits = np.asarray(logits).reshape(*shape, -1) if wanted else [None] * len(held)
        for group, parts, *own in zip(self.groups, held, chosen, logits, strict=True):
            got = group.settle(parts, *own)
            new |= got
            self.stats.drafts += sum(part.drafts for part in parts)
            self.stats.accepted += sum(len(tokens) - 1 for tokens in got.values())
        return new

    def run(self) -> Iterator[dict[Request, list[int]]]:
        """Step until nobody waits or runs."""
        while self.busy:
            yield self.step()

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, *, logits: bool = False
    ) -> list[Request]:
        """Requests for all of them, finished."""
        requests = [self.submit(prompt, max_tokens, logits=logits) for prompt in prompts]
        for _ in self.run():
            pass
        return requests

    def drop_prefixes(self) -> None:
        """Let go of all cached prefixes."""
        for group in self.groups:
            group.drop_prefixes()

    def pages_in_use(self) -> int:
        """Of all pools, with those of cached prefixes."""
        return sum(group.pages.in_use() for group in self.groups)
