"""The points that are measured: what one figure is of, and the places its calls rotate through.

    python benchmarks/points.py [--points raw prefix] [--batch 16] | ./graph /dev/stdin

``points.csv`` names them. ``decode.py`` measures them in compiled programs. ``graph.cu`` measures
them in CUDA graphs captured by hand, from the lines that this prints: bytes, lengths and the sizes
of the rotation are worked out here, once for both.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PATH = pathlib.Path(__file__).with_name("points.csv")
PAGE_SIZE = 32
POOL_BYTES = 1 << 30
COLD_BYTES = 256 << 20  # aimed at between two uses of a page: several times an L2
MIN_CALLS, MAX_CALLS = 128, 512  # in a program: more of them compile for long
LAYERS = 96
REGIMES = ("all emit", "distributed", "no hit")
PLACES = ("own", "layers", "warm")
BESIDE = ("baselines", "jnp")
ITEMSIZE = {"bfloat16": 2, "float32": 4}


class Rotation(NamedTuple):
    """Call i works on state i % states, through table i % tables."""

    calls: int
    states: int
    tables: int
    pages: int  # of each state


@dataclasses.dataclass(frozen=True)
class Point:
    """What one figure is of. The field names are keys of the records in the JSON lines."""

    regime: str
    batch: int
    next_n: int = 4
    ratio: int = 128
    overlap: bool = False
    head_dim: int = 512
    kv_score: str = "bfloat16"
    state: str = "float32"
    out: str = "bfloat16"
    format: str = "raw"
    warm: bool = False
    layers: bool = False
    max_pages: int = 0  # of a table; as many as are used, at least

    @property
    def state_dim(self) -> int:
        return self.head_dim * (2 if self.overlap else 1)

    @property
    def last(self) -> int:
        """The length at which a window is complete, and the longest of any request."""
        return self.ratio * (2 if self.overlap else 1)

    @property
    def pages_each(self) -> int:
        """The pages that a request uses."""
        return -(-self.last // PAGE_SIZE)

    def kv_lens(self) -> np.ndarray:
        """Lengths in the first window (the second where windows overlap)."""
        request = np.arange(self.batch)
        last = self.last
        match self.regime:
            case "all emit":
                lens = np.full(self.batch, last)
            case "distributed":  # phases next_n apart
                lens = last - self.next_n * (request % max(1, self.ratio // self.next_n))
            case "no hit":
                lens = np.full(self.batch, last - 1)
            case _:
                raise ValueError(f"regime: expected one of {REGIMES}, got {self.regime!r}")
        return lens.astype(np.int32)

    def bytes_moved(self) -> int:
        """Stored rows read, rows written, and the operands and results that are not state."""
        row = 2 * self.state_dim * ITEMSIZE[self.state]
        stored_rows = 0.0  # in units of a row of S channels: half of one where windows overlap
        if self.format == "prefix":
            stored_rows = self.batch  # the row before the step
        for length in map(int, self.kv_lens() if self.format == "raw" else ()):
            first_new = max(length - self.next_n, 0)
            for window in range(first_new // self.ratio, length // self.ratio):
                begin, end = window * self.ratio, (window + 1) * self.ratio
                reduced = max(begin - self.overlap * self.ratio, 0)
                stored_rows += max(min(end, first_new) - reduced, 0) / (1 + self.overlap)
        new_rows = self.batch * self.next_n
        kv_score = new_rows * 2 * self.state_dim * ITEMSIZE[self.kv_score]
        windows = self.batch * -(-self.next_n // self.ratio)
        kv_comp = windows * self.head_dim * ITEMSIZE[self.out]
        return int((stored_rows + new_rows) * row) + kv_score + kv_comp

    def rotation(self, calls: int | None = None) -> Rotation:
        """The places of this many calls; by default, as many as make each call's cold."""
        pages_of_call = self.batch * self.pages_each
        if self.layers:
            return Rotation(LAYERS, LAYERS, 1, pages_of_call)
        if calls is None:
            calls = min(max(COLD_BYTES // self.bytes_moved(), MIN_CALLS), MAX_CALLS)
        page_bytes = 2 * PAGE_SIZE * self.state_dim * ITEMSIZE[self.state]
        tables = min(calls, COLD_BYTES // self.bytes_moved() + 1)
        pages = max(POOL_BYTES // page_bytes, tables * pages_of_call)
        tables = 1 if self.warm else min(calls, pages // pages_of_call)
        return Rotation(calls, 1, tables, pages)

    def __str__(self) -> str:
        return (
            f"R {self.ratio}, D {self.head_dim}, next_n {self.next_n}, {self.kv_score} in "
            f"{self.state} {self.format}{', warm' * self.warm}{', layers' * self.layers}"
            f"{f', {self.max_pages} pages' * (self.max_pages > 0)}, {self.regime}, B={self.batch}"
        )


class Group(NamedTuple):
    """The points of one line of the list."""

    name: str
    beside: frozenset[str]
    points: tuple[Point, ...]


def read_line(line: dict[str, str]) -> Group:
    for column, values in (
        ("regime", REGIMES),
        ("overlap", ("yes", "no")),
        ("places", PLACES),
        ("kv_score", ITEMSIZE),
        ("state", ITEMSIZE),
    ):
        if line[column] not in values:
            raise ValueError(f"{column}: expected one of {tuple(values)}, got {line[column]!r}")
    beside = frozenset(line["beside"].split())
    if not beside <= set(BESIDE):
        raise ValueError(f"beside: expected some of {BESIDE}, got {line['beside']!r}")
    points = tuple(
        Point(
            regime=line["regime"],
            batch=int(batch),
            next_n=int(line["next_n"]),
            ratio=int(line["ratio"]),
            overlap=line["overlap"] == "yes",
            head_dim=int(line["head_dim"]),
            kv_score=line["kv_score"],
            state=line["state"],
            format=line["format"],
            warm=line["places"] == "warm",
            layers=line["places"] == "layers",
            max_pages=int(line["max_pages"]),
        )
        for batch in line["batches"].split()
    )
    return Group(line["group"], beside, points)


def read_groups(path: pathlib.Path = PATH) -> list[Group]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return [read_line(line) for line in csv.DictReader(lines, skipinitialspace=True)]


def select(
    names: Sequence[str] = (), but: Sequence[str] = (), batches: Sequence[int] = ()
) -> dict[Point, frozenset[str]]:
    """The points of the named groups, of all without a name, and what is measured beside each.

    Each is there once, however many groups it is in.
    """
    groups = read_groups()
    if unknown := {*names, *but} - {group.name for group in groups}:
        known = ", ".join(dict.fromkeys(group.name for group in groups))
        raise SystemExit(f"no such group: {', '.join(sorted(unknown))}; there are {known}")
    selected: dict[Point, frozenset[str]] = {}
    for group in groups:
        if (names and group.name not in names) or group.name in but:
            continue
        for point in group.points:
            if not batches or point.batch in batches:
                selected[point] = selected.get(point, frozenset()) | group.beside
    return selected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that ``select_named`` reads."""
    add = parser.add_argument
    add("--points", nargs="+", default=[], metavar="GROUP", help="of points.csv; default: all")
    add("--but", nargs="+", default=[], metavar="GROUP", help="groups to leave out")
    add("--batch", type=int, nargs="+", default=[], help="of these batches only")


def select_named(arguments: argparse.Namespace) -> dict[Point, frozenset[str]]:
    """``select``, by a command line."""
    return select(arguments.points, arguments.but, arguments.batch)


def line_for_graph(point: Point, beside: frozenset[str]) -> str:
    """``name=value ...``, a tab, and what the record of the result begins with."""
    rotation = point.rotation()
    values = {
        "head_dim": point.head_dim,
        "ratio": point.ratio,
        "overlap": int(point.overlap),
        "next_n": point.next_n,
        "kv_score_bytes": ITEMSIZE[point.kv_score],
        "state_bytes": ITEMSIZE[point.state],
        "prefix": int(point.format == "prefix"),
        "batch": point.batch,
        "page_size": PAGE_SIZE,
        "pages_each": point.pages_each,
        "max_pages": max(point.max_pages, point.pages_each),
        **rotation._asdict(),
        "flushed_bytes": 0 if point.warm else COLD_BYTES,
        "baselines": int("baselines" in beside),
        "kv_lens": ",".join(map(str, point.kv_lens())),
    }
    record = json.dumps(dataclasses.asdict(point))
    return " ".join(f"{name}={value}" for name, value in values.items()) + "\t" + record[1:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    for point, beside in select_named(parser.parse_args()).items():
        print(line_for_graph(point, beside))


if __name__ == "__main__":
    main()
