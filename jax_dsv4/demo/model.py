"""The compressor layers of a model, and a decode step through all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_dsv4 import CompressorState, PagePool, init_state, paged_kv_compress, pages_needed
from jax_dsv4.demo.scheduler import MAX_TOKENS, VOCAB, Plan

LAYERS = {"flash": (21, 21, 20), "pro": (30, 30, 31)}  # CSA, indexer, HCA


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of one kind."""

    name: str
    head_dim: int
    compress_ratio: int
    overlap: bool
    count: int

    @property
    def state_dim(self) -> int:
        """S, the channels of a state's row."""
        return self.head_dim * (1 + self.overlap)


def list_layers(model: str) -> tuple[Layers, ...]:
    """The compressor calls of one decode step of ``model``."""
    csa, indexer, hca = LAYERS[model]
    return (
        Layers("CSA", 512, 4, True, csa),
        Layers("indexer", 128, 4, True, indexer),
        Layers("HCA", 512, 128, False, hca),
    )


def make_pool(
    layers: Layers, *, batch: int, page_size: int, next_n: int, state_format: str
) -> PagePool:
    """Pages for the layers of one kind, so many that they never run out."""
    options = {
        "page_size": page_size,
        "compress_ratio": layers.compress_ratio,
        "overlap": layers.overlap,
        "format": state_format,
    }
    num_pages = batch * pages_needed(**options, next_n=next_n)
    return PagePool(num_pages, batch, -(-MAX_TOKENS // page_size), **options)


def init_layers(layers: Layers, pool: PagePool) -> CompressorState:
    """The f32 states of all layers of one kind, ``[layers, num_pages, page_size, S]``."""
    return init_state(
        pool.num_pages,
        pool.page_size,
        head_dim=layers.head_dim,
        compress_ratio=layers.compress_ratio,
        overlap=layers.overlap,
        layers=layers.count,
        format=pool.format,
    )


class Weights(NamedTuple):
    """What stands for the model in front of one kind's compressors.

    A token's projection is a row of one table per kind, picked by token and layer. Gathering costs
    little. Every call still gets an operand of its own: one array shared by all layers would stay
    in the cache. And the host finds the same rows for the check.
    """

    projections: Any  # [VOCAB, 2 S] bf16
    apes: Sequence[Any]  # of each layer, [R, S] f32


def make_weights(layers: Layers, rng: np.random.Generator) -> Weights:
    """Normally distributed, on the host."""
    projections = rng.standard_normal((VOCAB, 2 * layers.state_dim), np.float32)
    ape_shape = (layers.count, layers.compress_ratio, layers.state_dim)
    return Weights(
        projections.astype(jnp.bfloat16), list(rng.standard_normal(ape_shape, np.float32))
    )


def project(weights: Weights, tokens: Any, layer: int) -> Any:
    """kv_score of ``tokens`` at this layer, on the host or on the device."""
    return weights.projections[(tokens + 97 * layer) % VOCAB]


def compress_layers(
    layers: Layers,
    state: CompressorState,
    kv_scores: Sequence[Array],
    apes: Sequence[Array],
    plan: Plan,
    implementation: str | None,
) -> tuple[list[Array], CompressorState]:
    """The calls of one kind in one step -> (kv_comp of each layer, state of all).

    One array holds all layers, and each call updates its own layer of it in place. The loop is
    unrolled: a ``lax.scan`` would cost several microseconds per layer.
    """
    kv_comps = []
    for layer, (kv_score, ape) in enumerate(zip(kv_scores, apes, strict=True)):
        kv_comp, state = paged_kv_compress(
            kv_score,
            ape,
            state,
            plan.tables[layers.name],
            plan.kv_lens,
            compress_ratio=layers.compress_ratio,
            overlap=layers.overlap,
            layer=layer,
            q_lens=plan.q_lens,
            implementation=implementation,
        )
        kv_comps.append(kv_comp)
    return kv_comps, state


def make_step(model: Sequence[Layers], implementation: str | None) -> Callable[..., Any]:
    """``(states, weights, plan) -> (kv_comps, states)``, by kind; the states are donated."""

    def step(states, weights, plan):
        kv_comps, new_states = {}, {}
        for layers in model:
            name, own = layers.name, weights[layers.name]
            kv_scores = [project(own, plan.tokens, layer) for layer in range(layers.count)]
            kv_comps[name], new_states[name] = compress_layers(
                layers, states[name], kv_scores, own.apes, plan, implementation
            )
        return kv_comps, new_states

    return jax.jit(step, donate_argnums=0)
