"""Continuous batching on the host: requests, their prompts and drafts, and the pages they own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_dsv4 import CacheTables, PagePool

VOCAB = 1009
MAX_TOKENS = 512  # how many a request decodes is drawn from 1...MAX_TOKENS
ARRIVAL = 0.25  # probability that an empty slot gets a request, per step
RECORD_PAGE_TOKENS = 256  # whose records share a page
PREFIXES = 4  # cached at a time
CHUNKS = 2  # of prompts, for which a step has room beside all that decodes


class Traffic(NamedTuple):
    """The prompts that requests come with."""

    prompts: Sequence[int] = ()  # their lengths, in turn; none: requests have no prompt
    chunk: int = 1  # the most rows that a prompt brings per step
    shared: float = 0.0  # probability that a request starts from a cached prefix, if one fits

    @property
    def longest(self) -> int:
        """The most tokens of a request."""
        return max(self.prompts, default=0) + MAX_TOKENS

    @property
    def room(self) -> int:
        """The most rows that all prompts bring per step."""
        return CHUNKS * min(self.chunk, max(self.prompts)) if self.prompts else 0

    def count_record_pages(self, batch: int) -> int:
        """Pages of records for as many requests as there are slots, or prompts."""
        prompts = self.prompts or (0,)
        count = max(batch, len(prompts))
        return sum(pages_of(prompts[i % len(prompts)] + MAX_TOKENS) for i in range(count))


NO_PROMPTS = Traffic()


def pages_of(tokens: int) -> int:
    """How many pages their records take."""
    return -(-tokens // RECORD_PAGE_TOKENS)


def find_resume_every(page_size: int) -> int:
    """A cached prefix ends at a multiple of this: no page of it holds anything else."""
    return math.lcm(RECORD_PAGE_TOKENS, page_size)


@dataclasses.dataclass(eq=False)
class Prefix:
    """The first tokens of a prompt, whose pages stay for requests that begin with them.

    Only its end is resumed at. ``PagePool.share`` lets requests resume at any multiple, for which a
    state keeps pages all along a prompt: hundreds of them at 100,000 tokens.
    """

    slot: int  # of the page pools, behind those of requests
    tokens: np.ndarray
    users: int = 1  # requests that read its pages now; the first one writes them, too
    ready: bool = False  # whether that has been


@dataclasses.dataclass
class Request:
    """A sequence; ``tokens[:length]`` is accepted, the rest is still to come."""

    tokens: np.ndarray  # [target length] i32
    prompt: int = 0  # how many of them are known from the start
    prefix: Prefix | None = None  # whose pages it uses
    length: int = 0

    @property
    def record_pages(self) -> int:
        """Of its own, at its end."""
        return pages_of(len(self.tokens)) - pages_of(len(self.prefix.tokens) if self.prefix else 0)


class Plan(NamedTuple):
    """One step's operands, made on the host."""

    tokens: Any  # [B, next_n] i32; with prompts [T], one request's after the other's
    kv_lens: Any  # [B] i32, with the new tokens; 0: inactive slot
    q_lens: Any  # [B] i32, how many of the new tokens are real
    tables: dict[str, CacheTables]  # by kind of layer
    cu_q_lens: Any = None  # [B + 1] i32, with prompts: where a request's tokens begin and end


class Span(NamedTuple):
    """One request as it stood in one step."""

    slot: int
    length: int  # accepted before the step
    tokens: np.ndarray  # [kv_len] i32, with those of the step

    def windows(self, ratio: int) -> range:
        """Those that the step completes."""
        return range(self.length // ratio, len(self.tokens) // ratio)


class Pages(NamedTuple):
    """Who owns which pages of one kind of layer."""

    state: PagePool
    records: PagePool
    compress_ratio: int
    max_rewind: int | None = None  # of steps that store live rows only, as with prompts

    def hold(self, slot: int, length: int, next_n: int, prefix: Prefix | None = None) -> None:
        """Pages for the step's rows, and for all records of the request up to the step's end."""
        self.state.hold(slot, length, next_n, self.max_rewind)
        # From the first one on that no prefix has: attention reads all.
        first = len(prefix.tokens) // self.compress_ratio if prefix else 0
        if (end := (length + next_n) // self.compress_ratio) > first:
            self.records.hold(slot, first, end - first)

    def hold_prefix(self, prefix: Prefix) -> None:
        """Pages for its records, and for the rows that a step behind it reads."""
        self.hold(prefix.slot, len(prefix.tokens), 1)

    def release(self, slot: int) -> None:
        """Give back all pages of a slot."""
        self.state.release(slot)
        self.records.release(slot)

    def copy_tables(self, requests: Sequence[Request | None]) -> CacheTables:
        """The block tables of a step, in which the pages of prefixes are their users', too."""
        tables = []
        for pool, rows_per_token in ((self.state, 1), (self.records, 1 / self.compress_ratio)):
            table = pool.tables
            for own, request in zip(table, requests, strict=False):
                if request and (prefix := request.prefix):
                    end = round(len(prefix.tokens) * rows_per_token) // pool.page_size
                    shared = table[prefix.slot, :end]
                    own[:end] = np.where(shared >= 0, shared, own[:end])
            tables.append(table[: len(requests)])
        return CacheTables(*tables)


class Scheduler:
    """Which request is in which slot, how long it is, and the pages it owns.

    A step is: ``plan``, the device's work, ``settle``. Layers of one kind share their pages.
    """

    def __init__(
        self,
        pages: Mapping[str, Pages],
        *,
        batch: int,
        next_n: int,
        accept: float,
        rng: np.random.Generator,
        traffic: Traffic = NO_PROMPTS,
        resume_every: int = 1,
    ):
        """No requests yet; ``accept`` is the probability that a draft is accepted."""
        self.pages, self.next_n, self.accept, self.rng = pages, next_n, accept, rng
        self.traffic, self.resume_every = traffic, resume_every
        self.requests: list[Request | None] = [None] * batch
        self.prefixes: list[Prefix] = []  # cached, oldest first
        self.record_pages = traffic.count_record_pages(batch)  # that no request or prefix needs
        self.steps = self.started = self.finished = self.accepted = self.rejected = 0
        self.prefilled = self.sharing = self.reused = 0

    def plan(self, *, arrivals: bool = True, full: bool = False) -> Plan:
        """The next step: arrivals, the tokens to try, and pages for them.

        With prompts, T is one of two capacities: for what decodes, or also for prompts (``full``,
        or if there are any).
        """
        batch = len(self.requests)
        tokens = self.rng.integers(VOCAB, size=(batch, self.next_n), dtype=np.int32)
        kv_lens, q_lens = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        room = self.traffic.room
        for i in range(batch):
            slot = (i + self.steps) % batch  # each is the first one to get room in its turn
            if arrivals and self.requests[slot] is None and self.rng.random() < ARRIVAL:
                self._start(slot)
            request = self.requests[slot]
            if request is None:
                continue
            if request.length < request.prompt:
                n = min(self.traffic.chunk, request.prompt - request.length, room)
                room -= n
            else:
                n = min(self.next_n, len(request.tokens) - request.length)  # fewer in its last step
                request.tokens[request.length : request.length + n] = tokens[slot, :n]
            if n:
                kv_lens[slot], q_lens[slot] = request.length + n, n
            for pages in self.pages.values():
                pages.hold(slot, request.length, max(n, 1), request.prefix)
        self.steps += 1
        tables = {name: pages.copy_tables(self.requests) for name, pages in self.pages.items()}
        if not self.traffic.prompts:
            return Plan(tokens, kv_lens, q_lens, tables)
        cu_q_lens = np.append(0, np.cumsum(q_lens)).astype(np.int32)
        size = tokens.size + (self.traffic.room if full or room < self.traffic.room else 0)
        rows = self.rng.integers(VOCAB, size=size, dtype=np.int32)  # padding is anything
        for slot, request in enumerate(self.requests):
            if request is not None:
                new = request.tokens[request.length : request.length + q_lens[slot]]
                rows[cu_q_lens[slot] : cu_q_lens[slot + 1]] = new
        return Plan(rows, kv_lens, q_lens, tables, cu_q_lens)

    def settle(self, plan: Plan) -> None:
        """Accept prompts; of what decodes the first token, and drafts up to the first rejected one.

        Rejected tokens need no clean-up: the next step overwrites their rows.
        """
        for slot, request in enumerate(self.requests):
            if request is None:
                continue
            n = int(plan.q_lens[slot])
            if request.length < request.prompt:
                request.length += n
                self.prefilled += n
                if (prefix := request.prefix) and request.length >= len(prefix.tokens):
                    prefix.ready = True
                continue
            rejected = np.flatnonzero(self.rng.random(n - 1) >= self.accept)
            taken = 1 + int(rejected[0]) if rejected.size else n
            request.length += taken
            self.accepted += taken
            self.rejected += n - taken
            if request.length == len(request.tokens):
                self._finish(slot, request)

    def list_spans(self, plan: Plan) -> list[Span]:
        """What the check needs to know of the step just planned."""
        return [
            Span(slot, request.length, request.tokens[: request.length + plan.q_lens[slot]].copy())
            for slot, request in enumerate(self.requests)
            if request is not None
        ]

    def _start(self, slot: int) -> None:
        """The next request, unless it has to wait for others' pages."""
        target, prompts = self.rng.integers(1, MAX_TOKENS + 1), self.traffic.prompts
        request = Request(np.zeros(target, np.int32))
        if prompts:
            request.prompt = prompts[self.started % len(prompts)]
            tokens = self.rng.integers(VOCAB, size=request.prompt, dtype=np.int32)
            request.tokens = np.append(tokens, request.tokens)
            if self.rng.random() < self.traffic.shared:
                self._start_from_prefix(request)
        while request.record_pages > self.record_pages:
            if not self._drop_prefix(request.prefix):
                return
        if request.prefix:
            request.prefix.users += 1
            self.sharing += 1
            self.reused += request.length
        self.record_pages -= request.record_pages
        if not request.prefix:
            self._cache_prefix(request)
        self.requests[slot] = request
        self.started += 1

    def _start_from_prefix(self, request: Request) -> None:
        """Let a request begin with the longest cached prefix that is shorter than its prompt."""
        fitting = [x for x in self.prefixes if x.ready and len(x.tokens) < request.prompt]
        if fitting:
            request.prefix = max(fitting, key=lambda prefix: len(prefix.tokens))
            request.length = len(request.prefix.tokens)
            request.tokens[: request.length] = request.prefix.tokens

    def _cache_prefix(self, request: Request) -> None:
        """Make the longest prefix of a prompt one that later requests may begin with."""
        length = max(request.prompt - 1, 0) // self.resume_every * self.resume_every
        if not length or (len(self.prefixes) == PREFIXES and not self._drop_prefix()):
            return
        used = {prefix.slot for prefix in self.prefixes}
        slot = next(x for x in range(len(self.requests), 2**31) if x not in used)
        request.prefix = Prefix(slot, request.tokens[:length].copy())
        self.prefixes.append(request.prefix)
        for pages in self.pages.values():
            pages.hold_prefix(request.prefix)

    def _drop_prefix(self, wanted: Prefix | None = None) -> bool:
        """Give back the pages of the oldest prefix that is not in use, if there is one."""
        for prefix in self.prefixes:
            if not prefix.users and prefix is not wanted:
                self.prefixes.remove(prefix)
                self.record_pages += pages_of(len(prefix.tokens))
                for pages in self.pages.values():
                    pages.release(prefix.slot)
                return True
        return False

    def _finish(self, slot: int, request: Request) -> None:
        self.requests[slot] = None
        self.finished += 1
        self.record_pages += request.record_pages
        if request.prefix:
            request.prefix.users -= 1
        for pages in self.pages.values():
            pages.release(slot)
