"""The compressor layers of a model, and a step through all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_dsv4 import (
    Compressor,
    CompressorCache,
    PagePool,
    decode_records,
    init_records,
    init_state,
    make_cos_sin_cache,
    pages_needed,
    ragged_records,
)
from jax_dsv4.demo.scheduler import (
    NO_PROMPTS,
    PREFIXES,
    RECORD_PAGE_TOKENS,
    VOCAB,
    Pages,
    Plan,
    Traffic,
    pages_of,
)

LAYERS = {"flash": (21, 21, 20), "pro": (30, 30, 31)}  # CSA, indexer, HCA
YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
CONFIG = {"qk_rope_head_dim": 64, "compress_rope_theta": 160000, "rope_scaling": YARN}
INDEXER_FORMATS = ("f32", "bf16", "mxfp4")  # which the indexer takes, too
INITIAL_BYTE = 0xA5  # of record pools: neither 0 nor NaN in any format


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of one kind."""

    name: str
    head_dim: int
    compress_ratio: int
    overlap: bool
    count: int
    record_format: str
    hadamard: bool = False

    @property
    def state_dim(self) -> int:
        """S, the channels of a state's row."""
        return self.head_dim * (1 + self.overlap)


def list_layers(model: str, record_format: str = "fp8_ds_mla") -> tuple[Layers, ...]:
    """The compressor calls of one decode step of ``model``."""
    csa, indexer, hca = LAYERS[model]
    indexer_format = record_format if record_format in INDEXER_FORMATS else "fp8_block128"
    return (
        Layers("CSA", 512, 4, True, csa, record_format),
        Layers("indexer", 128, 4, True, indexer, indexer_format, hadamard=True),
        Layers("HCA", 512, 128, False, hca, record_format),
    )


def make_pages(
    layers: Layers,
    *,
    batch: int,
    page_size: int,
    next_n: int,
    state_format: str,
    traffic: Traffic = NO_PROMPTS,
) -> Pages:
    """Pages for the layers of one kind: of the state so many that they never run out."""
    options = {
        "page_size": page_size,
        "compress_ratio": layers.compress_ratio,
        "overlap": layers.overlap,
        "format": state_format,
    }
    num_pages, slots, max_rewind = batch * pages_needed(**options, next_n=next_n), batch, None
    if traffic.prompts:
        # A chunk needs pages for what it reads, and for what steps behind it may read: no others.
        max_rewind, slots = next_n - 1, batch + PREFIXES
        num_pages += slots * pages_needed(**options, next_n=1)
    state = PagePool(num_pages, slots, -(-traffic.longest // page_size), **options)
    page_size, max_pages = RECORD_PAGE_TOKENS // layers.compress_ratio, pages_of(traffic.longest)
    num_pages = traffic.count_record_pages(batch)
    # Of windows of 2 that do not overlap, a slot holds the pages from its first record on.
    records = PagePool(num_pages, slots, max_pages, page_size=page_size, compress_ratio=2)
    return Pages(state, records, layers.compress_ratio, max_rewind)


def init_layers(layers: Layers, pages: Pages) -> CompressorCache:
    """The f32 states and the records of all layers of one kind."""
    sizes: dict[str, Any] = {"head_dim": layers.head_dim, "layers": layers.count}
    kind = {"compress_ratio": layers.compress_ratio, "overlap": layers.overlap}
    pool, own = pages.state, pages.records
    state = init_state(pool.num_pages, pool.page_size, **sizes, **kind, format=pool.format)
    records = init_records(own.num_pages, own.page_size, **sizes, format=layers.record_format)
    used = jnp.full_like(records.pool, INITIAL_BYTE)  # as if by earlier requests
    return CompressorCache(state, dataclasses.replace(records, pool=used))


class Weights(NamedTuple):
    """What stands for the model in front of one kind's compressors.

    A token's projection is a row of one table per kind, picked by token and layer. Gathering costs
    little. Every call still gets an operand of its own: one array shared by all layers would stay
    in the cache. And the host finds the same rows for the check.
    """

    projections: Any  # [VOCAB, 2 S] bf16
    apes: Sequence[Any]  # of each layer, [R, S] f32
    norms: Sequence[Any]  # of each layer, [D] f32
    cos_sin_cache: Any  # [max_position, 64] f32


def make_weights(
    layers: Layers, rng: np.random.Generator, max_position: int = NO_PROMPTS.longest
) -> Weights:
    """Normally distributed, those of norms around 1; on the host."""
    projections = rng.standard_normal((VOCAB, 2 * layers.state_dim), np.float32)
    ape_shape = (layers.count, layers.compress_ratio, layers.state_dim)
    apes = rng.standard_normal(ape_shape, np.float32)
    norms = 1 + rng.standard_normal((layers.count, layers.head_dim), np.float32) / 8
    table = make_cos_sin_cache(CONFIG, max_position)
    return Weights(projections.astype(jnp.bfloat16), list(apes), list(norms), table)


def project(weights: Weights, tokens: Any, layer: int) -> Any:
    """kv_score of ``tokens`` at this layer, on the host or on the device."""
    return weights.projections[(tokens + 97 * layer) % VOCAB]


def call_layers(
    layers: Layers,
    cache: CompressorCache,
    kv_scores: Sequence[Array],
    weights: Weights,
    plan: Plan,
    **attributes: Any,
) -> CompressorCache:
    """The calls of one kind in one step.

    One array holds all layers, and each call updates its own layer of it in place. The loop is
    unrolled: a ``lax.scan`` would cost several microseconds per layer.
    """
    for layer, kv_score in enumerate(kv_scores):
        compressor = Compressor(
            weights.apes[layer],
            weights.norms[layer],
            weights.cos_sin_cache,
            head_dim=layers.head_dim,
            compress_ratio=layers.compress_ratio,
            overlap=layers.overlap,
            hadamard=layers.hadamard,
        )
        operands = (kv_score, compressor, cache, plan.tables[layers.name], plan.kv_lens)
        if plan.cu_q_lens is None:
            cache = decode_records(*operands, layer=layer, q_lens=plan.q_lens, **attributes)
        else:
            cache = ragged_records(*operands, plan.cu_q_lens, layer=layer, **attributes)
    return cache


def make_step(model: Sequence[Layers], **attributes: Any) -> Callable[..., Any]:
    """``(caches, weights, plan) -> caches``, by kind; the caches are donated.

    ``attributes``: those of all calls: ``implementation``, and with prompts ``store_rows``.
    """

    def step(caches, weights, plan):
        stepped = {}
        for layers in model:
            own = weights[layers.name]
            kv_scores = [project(own, plan.tokens, layer) for layer in range(layers.count)]
            stepped[layers.name] = call_layers(
                layers, caches[layers.name], kv_scores, own, plan, **attributes
            )
        return stepped

    return jax.jit(step, donate_argnums=0)
