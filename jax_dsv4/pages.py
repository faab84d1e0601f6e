"""The pages of a paged state: which of them a step needs, and who uses them. All on the host."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jax_dsv4 import _check, _config


class OutOfPages(RuntimeError):
    """A ``PagePool`` has too few free pages for what a slot needs; the pool is unchanged."""


class _LivePages(NamedTuple):
    """``before``, and ``first`` up to and including ``last``."""

    before: int  # the page of the previous window's last row; ``first`` where none is needed
    first: int
    last: int

    @property
    def num_live(self) -> int:
        return self.last - self.first + 1 + (self.before < self.first)

    def indices(self) -> list[int]:
        return sorted({self.before, *range(self.first, self.last + 1)})


class _Layout(NamedTuple):
    """How a request's rows lie on pages, and which of them a step needs."""

    page_size: int
    ratio: int
    overlap: bool
    format: str

    def step_pages(self, length: int, next_n: int, max_rewind: int | None) -> set[int]:
        """Those of a step that brings ``next_n`` rows after ``length`` others."""
        if max_rewind is None:
            filled = length % self.ratio
            return set(self._live(length - filled, filled, next_n).indices())
        # Old rows, and of the new ones those that are stored.
        end = length + next_n
        shortest = max(end - max_rewind, length)
        stored = range(shortest // self.page_size, (end - 1) // self.page_size + 1)
        return {
            *self.read_pages(length),
            *self.read_pages(shortest),
            *(page for page in stored if self._is_read(page, shortest, end)),
        }

    def resume_pages(self, start: int, end: int, resume_every: int | None) -> set[int]:
        """Those that steps read which start at a multiple of ``resume_every`` in (start, end]."""
        if resume_every is None:
            return set()
        first = (start // resume_every + 1) * resume_every
        return {
            page
            for multiple in range(first, end + 1, resume_every)
            for page in self.read_pages(multiple)
        }

    def read_pages(self, length: int) -> list[int]:
        """Those of the old rows that a step from ``length`` reads."""
        filled = length % self.ratio
        start = length - filled
        before = self.overlap and start > 0
        if self.format == "raw":
            rows = [range(start - before * self.ratio, length)]
        else:
            rows = [range(start - before, start), range(length - (filled > 0), length)]
        size = self.page_size
        return [page for r in rows if r for page in range(r[0] // size, r[-1] // size + 1)]

    def _is_read(self, page: int, start: int, end: int) -> bool:
        """Whether later steps read any of the rows start <= row < end on a page that has some.

        Where windows are disjoint, none reads the last row of a window.
        """
        first = max(page * self.page_size, start)
        num_rows = min((page + 1) * self.page_size, end) - first
        ends_window = first % self.ratio == self.ratio - 1
        return num_rows > 1 or (num_rows == 1 and (self.overlap or not ends_window))

    def largest(self, next_n: int) -> Iterator[_LivePages]:
        """Live pages at lengths among which are those with the most, and with the widest span.

        What is live depends on how many rows the open window has, and on where it starts on a
        page: at a multiple of gcd(R, page_size). Move that start along. There are more live pages
        only once the last row moves on to another page. So of all starts, try the first one that
        has it there.
        """
        size, step = self.page_size, math.gcd(self.ratio, self.page_size)
        far = self.ratio * size  # at the start of a page, and not the first window
        for filled in range(self.ratio):
            last = filled + next_n - 1  # from the window's start
            yield self._live(far + -(last // step) * step % size, filled, next_n)

    def _live(self, start: int, filled: int, next_n: int) -> _LivePages:
        """``start``: of the open window; ``filled``: its rows before the step."""
        last = (start + filled + next_n - 1) // self.page_size
        if self.format == "raw":
            first = max(start - self.overlap * self.ratio, 0) // self.page_size
            return _LivePages(first, first, last)
        first = (start + max(filled - 1, 0)) // self.page_size
        before = (start - 1) // self.page_size if self.overlap and start > 0 else first
        return _LivePages(before, first, last)


def _checked_layout(page_size: Any, compress_ratio: Any, overlap: Any, format: Any) -> _Layout:
    page_size = _check.integer("page_size", page_size, 1)
    ratio, overlap = _check.ratio_and_overlap(compress_ratio, overlap)
    _check.choice("format", format, _config.STATE_FORMATS)
    return _Layout(page_size, ratio, overlap, format)


def _checked_step(length: Any, next_n: Any, max_rewind: Any) -> tuple[int, int, int | None]:
    length, next_n = _check.integer("length", length, 0), _check.integer("next_n", next_n, 1)
    return length, next_n, _optional("max_rewind", max_rewind, 0)


def _optional(name: str, value: Any, minimum: int) -> int | None:
    return None if value is None else _check.integer(name, value, minimum)


def live_pages(
    length: int,
    page_size: int,
    *,
    compress_ratio: int,
    overlap: bool | None = None,
    next_n: int,
    format: str = "raw",
    max_rewind: int | None = None,
    resume_every: int | None = None,
) -> list[int]:
    """The logical pages of a request that its next step reads or writes: its others may be reused.

    In format ``"raw"``, those of the open window, where windows overlap of the window before it,
    and of the step's own rows. In format ``"prefix"``, those of the step's own rows, of the row
    before them unless it ends a window, and where windows overlap of the last row of the window
    before. No step from this length or from a greater one reads an earlier page that is not listed.

    A ragged call that stores only ``live(...)`` rows needs pages for those of its own rows only.

    Args:
      length: tokens of the sequence before the step, without rejected drafts.
      page_size: rows (tokens) per page.
      compress_ratio: R.
      overlap: whether windows overlap; ``None``: as R has it, 4 does and others do not.
      next_n: how many rows the step brings.
      format: of the state.
      max_rewind: of the ``live(...)`` that the step has as its ``store_rows``; ``None``: the step
        stores all its rows, as those of ``paged_kv_compress`` and ``decode_records`` do.
      resume_every: requests may resume at any multiple of it, as in ``live``: listed are also the
        pages that steps from those multiples read, up to the end of this step. ``None``: none does.

    Returns:
      Indices into the request's block table, in ascending order. In format ``"prefix"`` they may
      have a gap.

    Raises:
      ValueError, TypeError: an argument is out of range or no integer; the text names it.
    """
    layout = _checked_layout(page_size, compress_ratio, overlap, format)
    length, next_n, max_rewind = _checked_step(length, next_n, max_rewind)
    resume_every = _optional("resume_every", resume_every, 1)
    pages = layout.step_pages(length, next_n, max_rewind)
    return sorted(pages | layout.resume_pages(0, length + next_n, resume_every))


def pages_needed(
    page_size: int,
    *,
    compress_ratio: int,
    overlap: bool | None = None,
    next_n: int,
    format: str = "raw",
) -> int:
    """The most pages that one request has live (``live_pages``) at a time, however long it is.

    A ``PagePool`` of so many pages per slot never runs out. One of fewer pages can do as well:
    requests seldom all need the most at once.

    Args:
      page_size, compress_ratio, overlap, format: as in ``live_pages``.
      next_n: the most rows that a step brings per request.

    Raises:
      ValueError, TypeError: an argument is out of range or no integer; the text names it.
    """
    layout = _checked_layout(page_size, compress_ratio, overlap, format)
    next_n = _check.integer("next_n", next_n, 1)
    return max(live.num_live for live in layout.largest(next_n))


@dataclasses.dataclass
class _Slot:
    """What a pool knows of a slot."""

    pages: dict[int, int] = dataclasses.field(default_factory=dict)  # logical -> physical
    # Those that stay: of multiples up to `length`, and what other slots share. And the others: of
    # the step, which ends at `end`. Apart, so that a step takes no time for each page of a long
    # prefix.
    resumable: set[int] = dataclasses.field(default_factory=set)
    passing: set[int] = dataclasses.field(default_factory=set)
    length: int = 0
    end: int = 0


class PagePool:
    """The pages of a state: which request slots use which. A free list and the block tables.

    Before each step, ``hold`` the pages that a slot's request needs, and pass ``tables`` to the
    call. A page has one user, or as many as ``share`` it. All layers of a kind need the same pages,
    so one pool serves them all: its page ids are local to a layer. Nothing is to be cleared, of a
    page or of a slot: what earlier requests left there reaches nothing.

    Attributes, not to be changed: ``num_pages``, ``batch``, ``max_pages``, ``page_size``,
    ``format``, ``resume_every``.
    """

    def __init__(
        self,
        num_pages: int,
        batch: int,
        max_pages: int,
        *,
        page_size: int,
        compress_ratio: int,
        overlap: bool | None = None,
        format: str = "raw",
        resume_every: int | None = None,
    ):
        """All pages are free.

        Args:
          num_pages: pages in the pool, as many as the state has per layer. With
            ``batch * pages_needed(...)`` the pool never runs out, unless there is a
            ``resume_every``.
          batch: request slots.
          max_pages: logical pages per request: the longest has ``max_pages * page_size`` tokens,
            with drafts.
          page_size, compress_ratio, overlap, format: those of the state, as in ``live_pages``.
          resume_every: slots keep the pages, too, that a request needs to resume at a multiple of
            it, a multiple of ``page_size``, so that slots can ``share`` them; ``None``: they keep
            no more than their steps need.

        Raises:
          ValueError, TypeError: an argument is out of range or no integer; the text names it.
        """
        self.num_pages = _check.integer("num_pages", num_pages, 0)
        self.batch = _check.integer("batch", batch, 0)
        self.max_pages = _check.integer("max_pages", max_pages, 0)
        self._layout = _checked_layout(page_size, compress_ratio, overlap, format)
        self.page_size, self.format = self._layout.page_size, self._layout.format
        self.resume_every = _optional("resume_every", resume_every, 1)
        if self.resume_every is not None and self.resume_every % self.page_size:
            raise ValueError(
                f"resume_every: expected a multiple of page_size = {self.page_size}, "
                f"got {self.resume_every}"
            )
        # First in, first out: a page rests as long as it can, and pages get well mixed.
        self._free = deque(range(self.num_pages))
        self._num_users = [0] * self.num_pages
        self._slots = [_Slot() for _ in range(self.batch)]
        self._tables = np.full((self.batch, self.max_pages), -1, np.int32)

    @property
    def num_free(self) -> int:
        """How many pages no slot uses."""
        return len(self._free)

    @property
    def tables(self) -> np.ndarray:
        """``[batch, max_pages]`` i32, the page of each logical page of each slot, -1 where none.

        A copy, made anew each time: JAX may read a NumPy operand after the call that it was passed
        to has returned, when ``hold`` for the next step has changed the pool's own.
        """
        return self._tables.copy()

    def hold(self, slot: int, length: int, next_n: int, max_rewind: int | None = None) -> None:
        """Let a slot use exactly the pages that its next step needs: its ``live_pages``.

        Pages that are missing are allocated, and pages that no later step will read are free from
        now on, for the same step of other slots too, once no other slot shares them. For one
        request, ``length`` must not shrink from step to step; ``release`` the slot before its next
        request.

        Args:
          slot: of the request, in ``0...batch - 1``.
          length: tokens of the sequence before the step, without rejected drafts.
          next_n: how many rows the step brings to this request, drafts included, at least 1.
          max_rewind: of the ``live(...)`` that the step has as its ``store_rows``; ``None``: the
            step stores all its rows.

        Raises:
          OutOfPages: fewer are free than needed. Release another slot, and try again.
          ValueError, TypeError: an argument is out of range or no integer, ``length`` is less than
            in the slot's last step, or the step ends past ``max_pages``; the text names it.

        After an error the pool is as it was.
        """
        slot = _check.integer("slot", slot, 0, self.batch - 1)
        length, next_n, max_rewind = _checked_step(length, next_n, max_rewind)
        rows, end = self.max_pages * self.page_size, length + next_n
        if end > rows:
            raise ValueError(
                f"length: expected length + next_n of at most max_pages * page_size = {rows}, "
                f"got {length} + {next_n}"
            )
        layout, state = self._layout, self._slots[slot]
        if length < state.length:
            raise ValueError(
                f"length: expected at least {state.length}, as in the last step of slot {slot}, "
                f"got {length}: release the slot before its next request"
            )
        resumable = layout.resume_pages(state.length, length, self.resume_every)
        needed = layout.step_pages(length, next_n, max_rewind) | resumable
        needed |= layout.resume_pages(length, end, self.resume_every)
        missing = [page for page in sorted(needed) if page not in state.pages]
        unneeded = sorted(state.passing - needed)
        num_free = len(self._free) + len(unneeded)  # none of which is shared: those are resumable
        if len(missing) > num_free:
            num_there = len(state.pages) - len(unneeded)
            raise OutOfPages(
                f"slot {slot} needs {num_there + len(missing)} pages and has {num_there} of them; "
                f"{num_free} of {self.num_pages} are free"
            )
        self._give_back(slot, unneeded)
        for page in missing:
            self._take(slot, page, self._free.popleft())
        state.resumable |= resumable
        state.passing = needed - state.resumable
        state.length, state.end = length, end

    def share(self, slot: int, source: int, length: int) -> None:
        """Let a slot's new request resume where another slot's request had ``length`` tokens.

        It uses the other's pages for all that steps from ``length`` on read of the rows before, and
        from every smaller multiple of ``resume_every``; its own rows will go to pages of its own.
        Its first step is ``hold(slot, length, ...)``. To keep a prefix when its request has
        finished, share it with a slot that takes part in no call.

        Args:
          slot: a slot without a request: new, or released.
          source: the other slot. The calls that bring its first ``length`` tokens come before any
            of this slot, and none of these tokens is a draft that may be rejected.
          length: a multiple of ``resume_every``, at least 1.

        Raises:
          ValueError, TypeError: a slot is not in ``0...batch - 1``, ``slot`` is in use, ``source``
            holds no pages for so many tokens, or ``length`` is no such multiple; the text names the
            argument. The pool is as it was.
        """
        slot = _check.integer("slot", slot, 0, self.batch - 1)
        source = _check.integer("source", source, 0, self.batch - 1)
        length = _check.integer("length", length, 1)
        if self.resume_every is None or length % self.resume_every:
            raise ValueError(
                f"length: expected a multiple of resume_every = {self.resume_every}, got {length}"
            )
        state, other = self._slots[slot], self._slots[source]
        if state.end:
            raise ValueError(f"slot: expected one without a request, got {slot}: release it first")
        if length > other.end:
            raise ValueError(
                f"length: expected at most the {other.end} tokens of slot {source}, got {length}"
            )
        shared = self._layout.resume_pages(0, length, self.resume_every)
        for page in shared:
            self._take(slot, page, other.pages[page])
        state.resumable, state.length, state.end = shared, length, length
        # These stay with the other slot, too, even if its step is held again with fewer rows.
        other.resumable |= shared
        other.passing -= shared

    def release(self, slot: int) -> None:
        """Give back all pages of a slot, whose request has finished or was preempted.

        Raises:
          ValueError, TypeError: ``slot`` is not in ``0...batch - 1``.
        """
        slot = _check.integer("slot", slot, 0, self.batch - 1)
        self._give_back(slot, list(self._slots[slot].pages))
        self._slots[slot] = _Slot()

    def _take(self, slot: int, page: int, physical: int) -> None:
        self._slots[slot].pages[page] = self._tables[slot, page] = physical
        self._num_users[physical] += 1

    def _give_back(self, slot: int, pages: list[int]) -> None:
        for page in pages:
            physical = self._slots[slot].pages.pop(page)
            self._tables[slot, page] = -1
            self._num_users[physical] -= 1
            if not self._num_users[physical]:
                self._free.append(physical)


class SlotTables(NamedTuple):
    """Block tables in which each slot has pages of its own.

    Attributes:
      tables: ``[slots, max_pages]`` i32, a NumPy array. It never changes.
      num_pages: pages that the state needs.
    """

    tables: np.ndarray
    num_pages: int


def slot_tables(
    slots: int,
    max_len: int,
    page_size: int,
    *,
    compress_ratio: int,
    overlap: bool | None = None,
    next_n: int,
    format: str = "raw",
) -> SlotTables:
    """Block tables for an engine that has request slots and no pages: a ring of pages per slot.

    A slot's logical page i is page ``i % ring`` of its ring. The ring is as long as the live pages
    of a step span, gaps included, so that no two of them are ever the same. A smaller ring, such as
    one of just R or 2 R rows, is silently wrong as soon as a step brings more than one row: new
    rows overwrite others that the step still reads.

    Args:
      slots: request slots.
      max_len: tokens of the longest request, drafts included.
      page_size, compress_ratio, overlap, format: those of the state, as in ``live_pages``.
      next_n: the most rows that a step ever brings per request; a step with more of them is wrong.

    Returns:
      ``SlotTables(tables, num_pages)``, ``num_pages = slots * ring``.

    Raises:
      ValueError, TypeError: an argument is out of range or no integer; the text names it.
    """
    layout = _checked_layout(page_size, compress_ratio, overlap, format)
    slots, max_len = _check.integer("slots", slots, 0), _check.integer("max_len", max_len, 1)
    next_n = _check.integer("next_n", next_n, 1)
    max_pages = -(-max_len // layout.page_size)
    ring = min(max(live.last - live.before + 1 for live in layout.largest(next_n)), max_pages)
    if slots * ring > np.iinfo(np.int32).max:
        raise ValueError(f"slots: expected at most 2^31 - 1 pages, got {slots} slots of {ring}")
    first = np.arange(slots, dtype=np.int32) * np.int32(ring)
    return SlotTables(first[:, None] + np.arange(max_pages, dtype=np.int32) % ring, slots * ring)
