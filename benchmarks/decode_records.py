"""Time of one ``decode_records`` call on the GPU at hand, beside the call that ends in values.

    python benchmarks/decode_records.py [--cases HCA] [--formats prefix] [--records bf16]
        [--batch 16] [--out results.jsonl]

A program makes a call on each layer of a state and of record caches, in turn, as a model does: the
layers are in one donated array per kind, and share tables, lengths, weights and ``kv_score``. It
reads 1 GiB of something else: every call finds its state and its pages of records outside the L2
cache (cold), and a program takes longer than its dispatch. The time per call is the difference
between this program and one of a quarter of the calls; ``decode.py`` says how.

"Unfused" is ``paged_kv_compress`` on the same layers, in turns with the fused calls, its values in
f32. "Added" is what a fused call takes beyond it; of two compressors in one call, what they take
beyond a fused call of the first alone. In brackets what is aimed at.

``next_n`` 4, ``kv_score`` bf16, state f32 in pages of 32 rows, records in pages of 64.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from decode import read_all, time_per_call
from environment import describe_environment
from points import PAGE_SIZE, Point

from jax_dsv4 import (
    CacheTables,
    Compressor,
    CompressorCache,
    CompressorState,
    RecordCache,
    decode_records,
    init_records,
    make_cos_sin_cache,
    paged_kv_compress,
)

RECORD_PAGE_SIZE = 64
LAYERS = 48  # calls of a program: more of them compile for long
READ_MIB = 1024
ROPE = {"qk_rope_head_dim": 64, "compress_rope_theta": 160000}


class Kind(NamedTuple):
    """Compressors of one kind."""

    head_dim: int
    ratio: int


class Case(NamedTuple):
    """What is measured. Its compressors are served by one call."""

    kinds: tuple[Kind, ...]
    regime: str
    records: dict[str, tuple[str, ...]]  # the formats of the compressors' records, by a name
    targets: dict[str, dict[int, float]]  # microseconds added, by state format and batch


HCA, CSA, INDEXER = Kind(512, 128), Kind(512, 4), Kind(128, 4)
MAIN = {"bf16": ("bf16",), "fp8_ds_mla": ("fp8_ds_mla",)}
BATCHES = (1, 16, 64, 256)
ALL_EMIT = {
    "prefix": dict(zip(BATCHES, (0.5, 0.7, 0.7, 1.2), strict=True)),
    "raw": dict(zip(BATCHES, (0.7, 0.8, 0.7, 1.0), strict=True)),
}
FORMATS = tuple(ALL_EMIT)


def always(us: float, *batches: int) -> dict[str, dict[int, float]]:
    return {format: dict.fromkeys(batches, us) for format in FORMATS}


CASES = {
    "HCA": Case((HCA,), "all emit", MAIN, ALL_EMIT),
    "nothing": Case((HCA,), "no hit", MAIN, always(0.15, *BATCHES)),
    "CSA": Case((CSA,), "all emit", MAIN, ALL_EMIT),
    "indexer": Case(
        (INDEXER,),
        "all emit",
        {"fp8_block128": ("fp8_block128",), "mxfp4": ("mxfp4",)},
        always(0.6, 16, 256),
    ),
    "pair": Case(
        (CSA, INDEXER),
        "all emit",
        {main: (main, "fp8_block128") for main in MAIN},
        always(0.5, *BATCHES),
    ),
}


COLUMNS = {
    "us": "fused",
    "unfused_us": "unfused",
    "first_alone_us": "the first alone",
    "added_us": "added",
}


class Caches(NamedTuple):
    """Of all layers; a state for each compressor."""

    states: tuple[CompressorState, ...]
    records: dict[str, tuple[RecordCache, ...]]  # by the name of their formats


class Inputs(NamedTuple):
    """What every call reads, of each compressor."""

    kv_scores: tuple[jax.Array, ...]  # [B, next_n, 2 S]
    kv_score: jax.Array  # [B, next_n, all their columns]
    compressors: tuple[Compressor, ...]
    tables: tuple[CacheTables, ...]
    kv_lens: jax.Array  # [B]


def make_points(case: Case, batch: int, format: str) -> tuple[Point, ...]:
    """Of each compressor."""
    return tuple(
        Point(
            case.regime,
            batch,
            ratio=kind.ratio,
            overlap=kind.ratio == 4,
            head_dim=kind.head_dim,
            out="float32",
            format=format,
            layers=True,
        )
        for kind in case.kinds
    )


def make_operands(case: Case, points: tuple[Point, ...], layers: int) -> tuple[Caches, Inputs]:
    """Every request has pages of its own."""
    rng = np.random.default_rng(0)
    keys = iter(jax.random.split(jax.random.key(0), 64))
    normal = jax.random.normal

    def pages(count: int) -> jax.Array:
        order = rng.permutation(points[0].batch * count).astype(np.int32)
        return jnp.asarray(order.reshape(points[0].batch, count))

    rope = jnp.asarray(make_cos_sin_cache(ROPE, max(point.last for point in points)))
    compressors, tables, states = [], [], []
    for point in points:
        S = point.state_dim
        compressors.append(
            Compressor(
                *(
                    normal(next(keys), (point.ratio, S)),
                    normal(next(keys), (point.head_dim,)),
                    rope,
                ),
                head_dim=point.head_dim,
                compress_ratio=point.ratio,
                hadamard=point.head_dim == INDEXER.head_dim,
            )
        )
        tables.append(CacheTables(pages(point.pages_each), pages(1)))
        shape = (layers, point.batch * point.pages_each, PAGE_SIZE, S)
        states.append(CompressorState(*(normal(next(keys), shape) for _ in range(2)), point.format))
    records = {
        name: tuple(
            init_records(
                *(point.batch, RECORD_PAGE_SIZE),
                head_dim=point.head_dim,
                format=format,
                layers=layers,
            )
            for point, format in zip(points, formats, strict=True)
        )
        for name, formats in case.records.items()
    }
    kv_scores = [
        normal(next(keys), (point.batch, point.next_n, 2 * point.state_dim), point.kv_score)
        for point in points
    ]
    inputs = Inputs(
        tuple(kv_scores),
        jnp.concatenate(kv_scores, axis=-1),
        tuple(compressors),
        tuple(tables),
        jnp.asarray(points[0].kv_lens()),
    )
    return Caches(tuple(states), records), inputs


def call_unfused(caches: Caches, inputs: Inputs, layer: int) -> Caches:
    """A call for each compressor."""
    states = []
    operands = inputs.kv_scores, inputs.compressors, caches.states, inputs.tables
    for new_rows, compressor, state, tables in zip(*operands, strict=True):
        _, state = paged_kv_compress(
            *(new_rows, compressor.ape, state, tables.state, inputs.kv_lens),
            compress_ratio=compressor.compress_ratio,
            layer=layer,
            out_dtype=jnp.float32,
        )
        states.append(state)
    return caches._replace(states=tuple(states))


def call_fused(caches: Caches, inputs: Inputs, layer: int, *, name: str, count: int) -> Caches:
    """One call for the first ``count`` compressors, into the records of this name."""
    records = caches.records[name]
    stepped = decode_records(
        inputs.kv_score if count == len(records) else inputs.kv_scores[:count],
        inputs.compressors[:count],
        tuple(map(CompressorCache, caches.states[:count], records)),
        inputs.tables[:count],
        inputs.kv_lens,
        layer=layer,
    )
    return Caches(
        (*(cache.state for cache in stepped), *caches.states[count:]),
        caches.records | {name: (*(cache.records for cache in stepped), *records[count:])},
    )


def make_program(call: Callable[..., Caches], calls: int):
    """A jitted (caches, inputs, something else to read) -> (caches, a value)."""

    def program(caches, inputs, something_else):
        for layer in range(calls):
            caches = call(caches, inputs, layer)
        return caches, jnp.sum(read_all(something_else))

    return jax.jit(program, donate_argnums=0)


def measure(case: Case, batch: int, format: str, args: Any) -> list[dict[str, Any]]:
    """A record for each choice of formats."""
    points = make_points(case, batch, format)
    names = [name for name in case.records if not args.records or name in args.records]
    count = len(points)
    variants: dict[Any, Callable[..., Caches]] = {"unfused": call_unfused}
    for name in names:
        # Of two compressors, the first alone, too.
        for served in {1, count}:
            variants[name, served] = functools.partial(call_fused, name=name, count=served)
    caches, inputs = make_operands(case, points, args.layers)
    something_else = jnp.ones(args.read_mib << 18, jnp.float32)
    makers = [functools.partial(make_program, call) for call in variants.values()]
    times = time_per_call(makers, args.layers, caches, (inputs, something_else), seconds=0.05)
    us = dict(zip(variants, times, strict=True))
    lines = []
    for name in names:
        fused, unfused = us[name, count], us["unfused"]
        line = {"us": fused, "unfused_us": unfused, "added_us": fused - unfused}
        if count > 1:
            line |= {"first_alone_us": us[name, 1], "added_us": fused - us[name, 1]}
        line = {key: round(value, 3) for key, value in line.items()}
        lines.append({"records": name} | line | {"target_us": case.targets[format].get(batch)})
    return [dataclasses.asdict(points[0]) | line for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    add("--records", nargs="+", default=[], help="of these formats only")
    add("--batch", type=int, nargs="+", default=BATCHES)
    add("--layers", type=int, default=LAYERS, help="calls of a program; a multiple of 4")
    add("--read-mib", type=int, default=READ_MIB, help="what a program reads beside its calls")
    add("--commit", help="what is measured, where this is no git checkout")
    add("--out", default="/dev/null", help="append JSON lines to this file")
    args = parser.parse_args()

    info = describe_environment(args.commit)
    print(json.dumps(info), flush=True)
    with open(args.out, "a") as out:
        for name, format, batch in itertools.product(args.cases, args.formats, args.batch):
            for record in measure(CASES[name], batch, format, args):
                out.write(json.dumps({"case": name} | record | info) + "\n")
                out.flush()
                cells = [
                    f"{what} {record[key]:.2f}" for key, what in COLUMNS.items() if key in record
                ]
                target = f" ({record['target_us']:.2f})" if record["target_us"] else ""
                what = f"{name}, {format}, B={batch}, {record['records']}"
                print(f"{what}: {', '.join(cells)}{target}", flush=True)


if __name__ == "__main__":
    main()
