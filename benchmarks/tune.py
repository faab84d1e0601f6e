"""Measures every compiled geometry on the GPU at hand, and prints the lines to commit.

    python benchmarks/tune.py

Candidates are the lines of ``GeometriesOf`` in ffi/config.h: add some, build, and run this. For
each ratio (D 512; every request completing a window, and hits distributed) it prints microseconds
per call by batch; then the geometry that is best over the larger batches, to be the first of the
list, and the one that is best over the smaller ones, with the batch where they cross: ``kFew`` and
``kFewChannels``.
"""

from __future__ import annotations

import math

from decode import Point, geometries_of, measure

BATCHES = (1, 16, 32, 64, 128, 256)
SMALL = 32  # the largest batch by which the geometry for few requests is chosen


def tune(ratio: int) -> None:
    names = {
        index: "/".join(map(str, geometry[:4]))
        for index, geometry in geometries_of(Point("all emit", 1, ratio=ratio))
        if not geometry.baseline
    }
    cost = {}  # by geometry and batch: the geometric mean over the regimes
    for batch in BATCHES:
        for index, name in names.items():
            times = [
                measure(Point(regime, batch, ratio=ratio), geometry=index)[0]
                for regime in ("all emit", "distributed")
            ]
            cost[index, batch] = math.sqrt(times[0] * times[1])
            print(
                f"R {ratio}, B={batch}, {name}: all emit {times[0]:.2f}, "
                f"distributed {times[1]:.2f} us",
                flush=True,
            )

    def best(batches):
        return min(names, key=lambda i: sum(math.log(cost[i, b]) for b in batches))

    many = best([b for b in BATCHES if b > 2 * SMALL])
    few = best([b for b in BATCHES if b <= SMALL])
    won = [b for b in BATCHES if cost[few, b] < cost[many, b]]
    print(
        f"R {ratio}: first of the list: {names[many]}; kFew: the index of {names[few]}; "
        f"kFewChannels = {max(won, default=0)} * 512"
    )


def main() -> None:
    for ratio in (4, 128):
        tune(ratio)


if __name__ == "__main__":
    main()
