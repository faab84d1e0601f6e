"""Continuous batching on the host: requests, their drafts, and the pages they own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jax_dsv4 import CacheTables, PagePool

VOCAB = 1009
MAX_TOKENS = 512  # a request's length is drawn from 1...MAX_TOKENS
ARRIVAL = 0.25  # probability that an empty slot gets a request, per step


@dataclasses.dataclass
class Request:
    """A sequence being decoded; ``tokens[:length]`` is accepted, the rest is still to come."""

    tokens: np.ndarray  # [target length] i32
    length: int = 0


class Plan(NamedTuple):
    """One step's operands, made on the host."""

    tokens: Any  # [B, next_n] i32
    kv_lens: Any  # [B] i32, with the new tokens; 0: inactive slot
    q_lens: Any  # [B] i32, how many of the new tokens are real
    tables: dict[str, CacheTables]  # by kind of layer


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

    def hold(self, slot: int, length: int, next_n: int) -> None:
        """Pages for the step's rows, and for all records of the request up to the step's end."""
        self.state.hold(slot, length, next_n)
        if num_records := (length + next_n) // self.compress_ratio:
            self.records.hold(slot, 0, num_records)  # from the first one on: attention reads all

    def release(self, slot: int) -> None:
        """Give back all pages of a slot."""
        self.state.release(slot)
        self.records.release(slot)

    def copy_tables(self) -> CacheTables:
        """The block tables of a step."""
        return CacheTables(self.state.tables, self.records.tables)


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
    ):
        """No requests yet; ``accept`` is the probability that a draft is accepted."""
        self.pages, self.next_n, self.accept, self.rng = pages, next_n, accept, rng
        self.requests: list[Request | None] = [None] * batch
        self.started = self.finished = self.accepted = self.rejected = 0

    def plan(self, *, arrivals: bool = True) -> Plan:
        """The next step: arrivals, the tokens to try, and pages for them."""
        batch = len(self.requests)
        tokens = self.rng.integers(VOCAB, size=(batch, self.next_n), dtype=np.int32)
        kv_lens, q_lens = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        for slot in range(batch):
            if arrivals and self.requests[slot] is None and self.rng.random() < ARRIVAL:
                self._start(slot)
            request = self.requests[slot]
            if request is None:
                continue
            n = min(self.next_n, len(request.tokens) - request.length)  # fewer in its last step
            end = request.length + n
            request.tokens[request.length : end] = tokens[slot, :n]
            kv_lens[slot], q_lens[slot] = end, n
            for pages in self.pages.values():
                pages.hold(slot, request.length, n)
        tables = {name: pages.copy_tables() for name, pages in self.pages.items()}
        return Plan(tokens, kv_lens, q_lens, tables)

    def settle(self, plan: Plan) -> None:
        """Accept each request's first token and some of its drafts, up to the first rejected one.

        Rejected tokens need no clean-up: the next step overwrites their rows.
        """
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
                self._finish(slot)

    def list_spans(self, plan: Plan) -> list[Span]:
        """What the check needs to know of the step just planned."""
        return [
            Span(slot, request.length, request.tokens[: plan.kv_lens[slot]].copy())
            for slot, request in enumerate(self.requests)
            if request is not None
        ]

    def _start(self, slot: int) -> None:
        target = self.rng.integers(1, MAX_TOKENS + 1)
        self.requests[slot] = Request(np.zeros(target, np.int32))
        self.started += 1

    def _finish(self, slot: int) -> None:
        self.requests[slot] = None
        self.finished += 1
        for pages in self.pages.values():
            pages.release(slot)
