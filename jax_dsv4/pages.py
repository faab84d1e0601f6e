"""The pages of a paged state: which of them a step needs, and who owns them. All on the host."""

from __future__ import annotations

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

    def live_at(self, length: int, next_n: int) -> _LivePages:
        """The live pages of a step that brings ``next_n`` rows after ``length`` others."""
        filled = length % self.ratio
        return self._live(length - filled, filled, next_n)

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


def live_pages(
    length: int,
    page_size: int,
    *,
    compress_ratio: int,
    overlap: bool | None = None,
    next_n: int,
    format: str = "raw",
) -> list[int]:
    """The logical pages of a request that its next step reads or writes: its others may be reused.

    In format ``"raw"``, those of the open window, where windows overlap of the window before it,
    and of the step's own rows. In format ``"prefix"``, those of the step's own rows, of the row
    before them unless it ends a window, and where windows overlap of the last row of the window
    before. No step from this length or from a greater one reads an earlier page that is not listed.

    Args:
      length: tokens of the sequence before the step, without rejected drafts.
      page_size: rows (tokens) per page.
      compress_ratio: R.
      overlap: whether windows overlap; ``None``: as R has it, 4 does and others do not.
      next_n: how many rows the step brings.
      format: of the state.

    Returns:
      Indices into the request's block table, in ascending order. In format ``"prefix"`` they may
      have a gap.

    Raises:
      ValueError, TypeError: an argument is out of range or no integer; the text names it.
    """
    layout = _checked_layout(page_size, compress_ratio, overlap, format)
    length, next_n = _check.integer("length", length, 0), _check.integer("next_n", next_n, 1)
    return layout.live_at(length, next_n).indices()


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


class PagePool:
    """The pages of a state: which request slot owns which. A free list and the block tables.

    Before each step, ``hold`` the pages that a slot's request needs, and pass ``tables`` to the
    call. A page has at most one owner. All layers of a kind need the same pages, so one pool serves
    them all: its page ids are local to a layer. Nothing is to be cleared, of a page or of a slot:
    what earlier requests left there reaches nothing.

    Attributes, not to be changed: ``num_pages``, ``batch``, ``max_pages``, ``page_size``,
    ``format``.
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
    ):
        """All pages are free.

        Args:
          num_pages: pages in the pool, as many as the state has per layer. With
            ``batch * pages_needed(...)`` the pool never runs out.
          batch: request slots.
          max_pages: logical pages per request: the longest has ``max_pages * page_size`` tokens,
            with drafts.
          page_size, compress_ratio, overlap, format: those of the state, as in ``live_pages``.

        Raises:
          ValueError, TypeError: an argument is out of range or no integer; the text names it.
        """
        self.num_pages = _check.integer("num_pages", num_pages, 0)
        self.batch = _check.integer("batch", batch, 0)
        self.max_pages = _check.integer("max_pages", max_pages, 0)
        self._layout = _checked_layout(page_size, compress_ratio, overlap, format)
        self.page_size, self.format = self._layout.page_size, self._layout.format
        # First in, first out: a page rests as long as it can, and pages get well mixed.
        self._free = deque(range(self.num_pages))
        self._owned: list[dict[int, int]] = [{} for _ in range(self.batch)]  # logical -> physical
        self._tables = np.full((self.batch, self.max_pages), -1, np.int32)

    @property
    def num_free(self) -> int:
        """How many pages no slot owns."""
        return len(self._free)

    @property
    def tables(self) -> np.ndarray:
        """``[batch, max_pages]`` i32, the page of each logical page of each slot, -1 where none.

        A copy, made anew each time: JAX may read a NumPy operand after the call that it was passed
        to has returned, when ``hold`` for the next step has changed the pool's own.
        """
        return self._tables.copy()

    def hold(self, slot: int, length: int, next_n: int) -> None:
        """Let a slot own exactly the pages that its next step needs.

        Pages that are missing are allocated, and pages that no later step will read are free from
        now on, for the same step of other slots too. For one request, ``length`` must not shrink
        from step to step; ``release`` the slot before its next request.

        Args:
          slot: of the request, in ``0...batch - 1``.
          length: tokens of the sequence before the step, without rejected drafts.
          next_n: how many rows the step brings to this request, drafts included, at least 1.

        Raises:
          OutOfPages: fewer are free than needed. Release another slot, and try again.
          ValueError, TypeError: an argument is out of range or no integer, or the step ends past
            ``max_pages``; the text names it.

        After an error the pool is as it was.
        """
        slot = _check.integer("slot", slot, 0, self.batch - 1)
        length, next_n = _check.integer("length", length, 0), _check.integer("next_n", next_n, 1)
        rows = self.max_pages * self.page_size
        if length + next_n > rows:
            raise ValueError(
                f"length: expected length + next_n of at most max_pages * page_size = {rows}, "
                f"got {length} + {next_n}"
            )
        needed, owned = self._layout.live_at(length, next_n).indices(), self._owned[slot]
        missing = [page for page in needed if page not in owned]
        unneeded = sorted(owned.keys() - needed)
        if len(missing) > len(self._free) + len(unneeded):
            raise OutOfPages(
                f"slot {slot} needs {len(needed)} pages and owns {len(needed) - len(missing)} of "
                f"them; {len(self._free) + len(unneeded)} of {self.num_pages} are free"
            )
        self._give_back(slot, unneeded)
        for page in missing:
            owned[page] = self._tables[slot, page] = self._free.popleft()

    def release(self, slot: int) -> None:
        """Give back all pages of a slot, whose request has finished or was preempted.

        Raises:
          ValueError, TypeError: ``slot`` is not in ``0...batch - 1``.
        """
        slot = _check.integer("slot", slot, 0, self.batch - 1)
        self._give_back(slot, list(self._owned[slot]))

    def _give_back(self, slot: int, pages: list[int]) -> None:
        for page in pages:
            self._free.append(self._owned[slot].pop(page))
            self._tables[slot, page] = -1


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
