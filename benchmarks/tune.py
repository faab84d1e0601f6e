"""Measures every compiled geometry on the GPU at hand, and prints the lines to commit.

    python benchmarks/tune.py ["512/128 disjoint" ...]

Candidates are the lines of ``GeometriesOf`` in ffi/tuning.h: add some, build, and run this. For
each kind of compressor, or those that are named, it prints microseconds per call by batch, with
every request completing a window and with hits distributed. Then it prints the geometry that is
best over the larger batches, to be the first of the list, and the one that is best over the smaller
ones, with the batch where they cross: ``kFew`` and ``kFewChannels``. A kind takes some minutes.
"""

from __future__ import annotations

import argparse
import math

from decode import geometry_variants, measure
from points import Point

from jax_dsv4 import _config

BATCHES = (1, 16, 32, 64, 128, 256)
SMALL = 32  # the largest batch by which the geometry for few requests is chosen


def tune(kind: _config.Kind) -> None:
    def point_of(regime: str, batch: int) -> Point:
        return Point(
            regime,
            batch,
            ratio=kind.compress_ratio,
            overlap=kind.overlap,
            head_dim=kind.head_dim,
        )

    variants = geometry_variants(point_of("all emit", 1))
    cost = {}  # by geometry and batch: the geometric mean over the regimes
    for batch in BATCHES:
        for variant in variants:
            all_emit, distributed = (
                measure(point_of(regime, batch), variant)[0]
                for regime in ("all emit", "distributed")
            )
            cost[variant, batch] = math.sqrt(all_emit * distributed)
            print(
                f"{kind}, B={batch}, {variant.name}: all emit {all_emit:.2f}, "
                f"distributed {distributed:.2f} us",
                flush=True,
            )

    def best(batches):
        return min(variants, key=lambda v: sum(math.log(cost[v, b]) for b in batches))

    many = best([b for b in BATCHES if b > 2 * SMALL])
    few = best([b for b in BATCHES if b <= SMALL])
    won = [b for b in BATCHES if cost[few, b] < cost[many, b]]
    print(
        f"{kind}: first of the list: {many.name}; kFew: the index of {few.name}; "
        f"kFewChannels = {max(won, default=0)} * {kind.head_dim}"
    )


def main() -> None:
    kinds = {str(kind): kind for kind in _config.KINDS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="kind", help=f"of {', '.join(kinds)}")
    names = parser.parse_args().kinds or kinds
    if unknown := [name for name in names if name not in kinds]:
        parser.error(f"no such kind: {', '.join(unknown)}; there are {', '.join(kinds)}")
    for name in names:
        tune(kinds[name])


if __name__ == "__main__":
    main()
