"""A DeepSeek-V4 decoder in plain jnp, whose compressors are calls of ``jax_dsv4``.

A step takes T rows: the new tokens of all requests, one request after the other. A row knows its
request and its position; whether it is of a prompt, decodes, or is a draft makes no difference.
Weights have the names and shapes of Hugging Face's ``modeling_deepseek_v4.py``: [out, in].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jax_dsv4 import (
    CacheTables,
    Compressor,
    CompressorCache,
    LiveRows,
    decode_records,
    dequantize_records,
    init_records,
    init_state,
    ragged_records,
)

CSA, HCA = 4, 128  # tokens of a record: compressed sparse and heavily compressed attention
ROPE_DIM = 64

Weights = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a model: Hugging Face's names, and DeepSeek-V4-Flash's values."""

    vocab_size: int = 129280
    hidden_size: int = 4096
    moe_intermediate_size: int = 2048
    num_attention_heads: int = 64
    head_dim: int = 512
    q_lora_rank: int = 1024
    compress_ratios: tuple[int, ...] = ()  # of each layer: 0 (sliding window only), CSA or HCA
    num_hash_layers: int = 3
    n_routed_experts: int = 256
    num_experts_per_tok: int = 6
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    sliding_window: int = 128
    o_groups: int = 8
    o_lora_rank: int = 1024
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    rms_norm_eps: float = 1e-6
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0

    def layers_of(self, ratio: int) -> list[int]:
        """The layers of one kind: the place of a layer in it is its index in the caches."""
        return [i for i, r in enumerate(self.compress_ratios) if r == ratio]


# --- What a step is given, and what it keeps --------------------------------------------------


class Tables(NamedTuple):
    """The page of each logical page of each request, [B, max_pages] i32; -1: none."""

    window: Any  # of the rows of the sliding window
    csa: Any  # of the states of CSA layers' compressors
    hca: Any  # of those of HCA layers
    records: Any  # of all records


class Batch(NamedTuple):
    """The operands of a step. ``cu_q_lens``: ragged; without: every request decodes."""

    tokens: Any  # [T] i32; or [B, next_n], left-aligned
    kv_lens: Any  # [B] i32, with the new tokens; 0: no request
    q_lens: Any  # [B] i32, how many tokens are new
    cu_q_lens: Any  # [B + 1] i32, where each request's rows begin; or None
    tables: Tables


class Caches(NamedTuple):
    """All that stays between steps; donated, and updated in place."""

    window: Array  # [layers, pages * page_size, D]: rotated keys, which are the values, too
    csa: tuple[CompressorCache, CompressorCache]  # the main compressors, and the indexers'
    hca: CompressorCache


class Sizes(NamedTuple):
    """Pages of the caches, and tokens of a page."""

    page_tokens: int  # of the sliding window's rows; the records of as many share a page
    state_rows: int  # of a page of a state
    window_pages: int
    csa_pages: int
    hca_pages: int
    record_pages: int


def init_caches(
    config: Config,
    sizes: Sizes,
    *,
    dtype: Any = jnp.float32,
    state_format: str = "raw",
    record_formats: tuple[str, str] = ("f32", "f32"),
) -> Caches:
    """Empty caches. ``record_formats``: of the main compressors, and of the indexers."""

    def init(head_dim: int, ratio: int, pages: int, record_format: str) -> CompressorCache:
        kind: dict[str, Any] = {"head_dim": head_dim, "layers": len(config.layers_of(ratio))}
        return CompressorCache(
            init_state(pages, sizes.state_rows, **kind, compress_ratio=ratio, format=state_format),
            init_records(
                sizes.record_pages, sizes.page_tokens // ratio, **kind, format=record_format
            ),
        )

    main, indexer = record_formats
    rows = sizes.window_pages * sizes.page_tokens
    return Caches(
        jnp.zeros((len(config.compress_ratios), rows, config.head_dim), dtype),
        (
            init(config.head_dim, CSA, sizes.csa_pages, main),
            init(config.index_head_dim, CSA, sizes.csa_pages, indexer),
        ),
        init(config.head_dim, HCA, sizes.hca_pages, main),
    )


class Rows(NamedTuple):
    """Of each row of a step, [T]: its request, its position in it, and whether it is a token."""

    request: Array
    position: Array
    valid: Array


def find_rows(batch: Batch) -> Rows:
    """Whose row is which; from ``kv_lens`` on the device alone."""
    if batch.cu_q_lens is None:
        num_requests, next_n = batch.tokens.shape
        request = jnp.repeat(jnp.arange(num_requests), next_n)
        row = jnp.tile(jnp.arange(next_n), num_requests)
    else:
        t = jnp.arange(batch.tokens.size)
        request = jnp.searchsorted(batch.cu_q_lens, t, side="right") - 1
        request = jnp.clip(request, 0, batch.kv_lens.size - 1)
        row = t - batch.cu_q_lens[request]
    valid = row < batch.q_lens[request]
    position = batch.kv_lens[request] - batch.q_lens[request] + row
    return Rows(request, jnp.where(valid, position, 0), valid)


def find_slots(table: Array, request: Array, index: Array, page_size: int) -> Array:
    """Where entry ``index`` of a request is in a paged pool; -1: nowhere."""
    page = table.at[request, index // page_size].get(mode="fill", fill_value=-1)
    return jnp.where((index >= 0) & (page >= 0), page * page_size + index % page_size, -1)


# --- Parts ------------------------------------------------------------------------------------


def linear(x: Array, weight: Array) -> Array:
    """[..., in] -> [..., out], in the weight's type."""
    return jnp.matmul(x.astype(weight.dtype), weight.T)


def rms_norm(x: Array, weight: Array | None = None, *, eps: float) -> Array:
    """Root-mean-square norm over the last axis, in f32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y if weight is None else y * weight.astype(jnp.float32)).astype(x.dtype)


def rotate(x: Array, cos_sin: Array, *, inverse: bool = False) -> Array:
    """Interleaved RoPE of the last channels of [T, ..., D]; ``cos_sin`` [T, 64] of the rows."""
    shape = (x.shape[0], *(1,) * (x.ndim - 2), ROPE_DIM // 2)
    cos, sin = (part.reshape(shape) for part in jnp.split(cos_sin, 2, axis=-1))
    sin = -sin if inverse else sin
    rest, rope = jnp.split(x, [x.shape[-1] - ROPE_DIM], axis=-1)
    even, odd = rope[..., 0::2].astype(jnp.float32), rope[..., 1::2].astype(jnp.float32)
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([rest, pairs.reshape(rope.shape).astype(x.dtype)], axis=-1)


def mix_streams(config: Config, w: Weights, h: Array) -> tuple[Array, Array, Array]:
    """Manifold-constrained hyper-connections: N residual streams around a block.

    ``h`` [T, N, H] -> the block's input [T, H], by how much its output goes into each stream
    [T, N], and how the streams mix [T, N, N]: a matrix whose rows and columns sum to 1, found by
    Sinkhorn's iteration.
    """
    n, eps = config.hc_mult, config.hc_eps
    flat = rms_norm(h.reshape(len(h), -1).astype(jnp.float32), eps=config.rms_norm_eps)
    mixes = jnp.split(linear(flat, w["fn"]), [n, 2 * n], axis=-1)
    pre, post, comb = (
        m * scale + base
        for m, scale, base in zip(mixes, w["scale"], jnp.split(w["base"], [n, 2 * n]), strict=True)
    )
    pre, post = jax.nn.sigmoid(pre) + eps, 2 * jax.nn.sigmoid(post)
    comb = jax.nn.softmax(comb.reshape(-1, n, n), axis=-1) + eps

    def normalize(axis: int, comb: Array) -> Array:
        return comb / (comb.sum(axis=axis, keepdims=True) + eps)

    comb = jax.lax.fori_loop(
        *(0, config.hc_sinkhorn_iters - 1),
        lambda _, comb: normalize(-2, normalize(-1, comb)),
        normalize(-2, comb),
    )
    return jnp.einsum("tn,tnh->th", pre, h.astype(jnp.float32)).astype(h.dtype), post, comb


def expand_streams(h: Array, y: Array, post: Array, comb: Array) -> Array:
    """The streams after a block that gave ``y`` [T, H]."""
    mixed = jnp.einsum("tjk,tjh->tkh", comb, h.astype(jnp.float32))
    return (mixed + post[:, :, None] * y[:, None].astype(jnp.float32)).astype(h.dtype)


def swiglu(config: Config, gate: Array, up: Array) -> Array:
    """The experts' activation, clamped."""
    limit = config.swiglu_limit
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def moe(config: Config, w: Weights, x: Array, tokens: Array) -> Array:
    """Mixture of experts: by token in the first layers (hash routing), by top-k behind them."""
    scores = jnp.sqrt(jax.nn.softplus(linear(x.astype(jnp.float32), w["gate.weight"])))
    if "gate.tid2eid" in w:
        experts = w["gate.tid2eid"][tokens]
    else:
        bias = w["gate.e_score_correction_bias"]
        _, experts = jax.lax.top_k(scores + bias, config.num_experts_per_tok)
    share = jnp.take_along_axis(scores, experts, axis=-1)
    share *= config.routed_scaling_factor / (share.sum(axis=-1, keepdims=True) + 1e-20)

    # Rows sorted by expert; each expert multiplies its own.
    num_experts, k = w["experts.down_proj"].shape[0], experts.shape[1]
    order = jnp.argsort(experts.reshape(-1))
    sizes = jnp.bincount(experts.reshape(-1), length=num_experts).astype(jnp.int32)
    rows = x[order // k].astype(w["experts.gate_up_proj"].dtype)
    gate_up = jax.lax.ragged_dot(rows, w["experts.gate_up_proj"].mT, sizes)
    hidden = swiglu(config, *jnp.split(gate_up, 2, axis=-1))
    down = jax.lax.ragged_dot(hidden, w["experts.down_proj"].mT, sizes)
    parts = jnp.zeros_like(down).at[order].set(down).reshape(*experts.shape, -1)
    routed = jnp.einsum("tk,tkh->th", share, parts.astype(jnp.float32)).astype(x.dtype)

    gate, up = (linear(x, w[f"shared_experts.{name}_proj.weight"]) for name in ("gate", "up"))
    shared = linear(swiglu(config, gate, up), w["shared_experts.down_proj.weight"])
    return routed + shared.astype(x.dtype)


# --- Attention --------------------------------------------------------------------------------


class Step(NamedTuple):
    """What all layers of a step share."""

    config: Config
    batch: Batch
    rows: Rows
    page_tokens: int  # tokens whose rows, or records, share a page
    store_rows: LiveRows | str
    implementation: str | None  # of the compressors
    compressors: bool  # False: leave their calls out, to see what they cost


def compress(step: Step, w: Weights, x: Array, table: Array, ratio: int, layer: int, cache: Any):
    """The new rows go through a layer's compressors: into their states and, where they complete a
    window, on as a record. Of a CSA layer these are two, in one call: the main one and the
    indexer's."""
    batch, config = step.batch, step.config
    parts = [("compressor", config.head_dim)]
    if ratio == CSA:
        parts.append(("compressor.indexer", config.index_head_dim))
    compressors = tuple(
        Compressor(
            w[f"{name}.position_bias"],
            w[f"{name}.kv_norm.weight"],
            table,
            head_dim=head_dim,
            compress_ratio=ratio,
            rms_norm_eps=config.rms_norm_eps,
        )
        for name, head_dim in parts
    )
    tables = CacheTables(
        batch.tables.csa if ratio == CSA else batch.tables.hca, batch.tables.records
    )
    kv_score = linear(x, w["compressor.kv_score"])
    own = cache if ratio == CSA else (cache,)
    if not step.compressors:
        own = jax.lax.optimization_barrier((own, kv_score))[0]  # the product stays
        return own if ratio == CSA else own[0]
    operands = (compressors, own, (tables,) * len(own), batch.kv_lens)
    options = {"layer": layer, "implementation": step.implementation}
    if batch.cu_q_lens is None:
        kv_score = kv_score.reshape(*batch.tokens.shape, -1)
        own = decode_records(kv_score, *operands, q_lens=batch.q_lens, **options)
    else:
        options["store_rows"] = step.store_rows
        own = ragged_records(kv_score, *operands, batch.cu_q_lens, **options)
    return own if ratio == CSA else own[0]


def read_records(step: Step, records: Any, request: Array, windows: Array, layer: int) -> Array:
    """The records of ``windows`` [N, K] of requests [N]: [N, K, D] f32; 0 where there is none."""
    table = step.batch.tables.records
    slots = find_slots(table, request[:, None], windows, records.page_size)
    values = dequantize_records(records, slots.reshape(-1), layer=layer)
    return values.reshape(*windows.shape, -1)


def visible_windows(step: Step, windows: Array, ratio: int) -> Array:
    """A query sees a record whose window's last token is not behind it; its own closes one."""
    return windows < (step.rows.position[:, None] + 1) // ratio


def index_records(
    step: Step, w: Weights, x: Array, qr: Array, cos_sin: Array, cache: CompressorCache, layer: int
) -> Array:
    """The lightning indexer: which records a row attends to, [T, K]."""
    config, (request, position, _) = step.config, step.rows
    num_requests, pages = step.batch.tables.records.shape
    num_windows = pages * cache.records.page_size
    windows = jnp.broadcast_to(jnp.arange(num_windows), (num_requests, num_windows))
    keys = read_records(step, cache.records, jnp.arange(num_requests), windows, layer)
    query = linear(qr, w["compressor.indexer.q_b_proj.weight"])
    query = rotate(query.reshape(len(x), config.index_n_heads, -1), cos_sin)
    weights = linear(x, w["compressor.indexer.scorer.weights_proj.weight"])
    scale = (config.index_n_heads * config.index_head_dim) ** -0.5
    k = min(config.index_topk, num_windows)

    def choose(row: tuple[Array, Array, Array, Array]) -> Array:
        query, weights, request, num_visible = row
        logits = jax.nn.relu(query.astype(jnp.float32) @ keys[request].T)  # [A, W]
        scores = (weights.astype(jnp.float32) * scale) @ logits
        scores = jnp.where(jnp.arange(num_windows) < num_visible, scores, -jnp.inf)
        return jax.lax.top_k(scores, k)[1]

    # In blocks, since each row takes the keys of its request along.
    num_visible = (position + 1) // CSA
    return jax.lax.map(choose, (query, weights, request, num_visible), batch_size=256)


def attend(q: Array, keys: Array, mask: Array, sinks: Array) -> Array:
    """Each row's own keys, which are the values: [T, A, D], [T, K, D], [T, K], [A] -> [T, A, D].

    One softmax over the sliding window, the records and a sink, which has no value.
    """
    keys = keys.astype(q.dtype)
    logits = jnp.einsum("tad,tkd->tak", q, keys, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None], logits * q.shape[-1] ** -0.5, -jnp.inf)
    sinks = sinks.astype(jnp.float32)[:, None]
    largest = jnp.maximum(logits.max(axis=-1, keepdims=True), sinks)
    weights = jnp.exp(logits - largest)
    weights /= weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - largest)
    return jnp.einsum("tak,tkd->tad", weights.astype(q.dtype), keys)


def attention(
    step: Step, params: Weights, w: Weights, layer: int, x: Array, caches: Caches
) -> tuple[Array, Caches]:
    """A layer's attention: sliding window, and records where the layer has a compressor."""
    config, (request, position, valid) = step.config, step.rows
    ratio, eps = config.compress_ratios[layer], config.rms_norm_eps
    table = params["cos_sin.compress" if ratio else "cos_sin.main"]
    cos_sin = table[position]
    qr = rms_norm(linear(x, w["q_a_proj.weight"]), w["q_a_norm.weight"], eps=eps)
    q = linear(qr, w["q_b_proj.weight"]).reshape(len(x), config.num_attention_heads, -1)
    q = rotate(rms_norm(q, eps=eps), cos_sin)
    kv = rms_norm(linear(x, w["kv_proj.weight"]), w["kv_norm.weight"], eps=eps)

    # The sliding window: rows in, and each row's own last ones out.
    page_tokens, window = step.page_tokens, caches.window
    slots = find_slots(step.batch.tables.window, request, position, page_tokens)
    slots = jnp.where(valid & (slots >= 0), slots, window.shape[1])  # out of range: dropped
    rotated = rotate(kv, cos_sin).astype(window.dtype)
    window = window.at[layer, slots].set(rotated, mode="drop")
    caches = caches._replace(window=window)
    seen = position[:, None] + jnp.arange(1 - config.sliding_window, 1)
    slots = find_slots(step.batch.tables.window, request[:, None], seen, page_tokens)
    keys = window.at[layer, slots].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    mask = slots >= 0

    if ratio:  # compress first, then attend: the row that closes a window sees its record
        own = config.layers_of(ratio).index(layer)
        if ratio == CSA:
            csa = compress(step, w, x, table, CSA, own, caches.csa)
            caches = caches._replace(csa=csa)
            chosen, records = index_records(step, w, x, qr, cos_sin, csa[1], own), csa[0].records
        else:
            hca = compress(step, w, x, table, HCA, own, caches.hca)
            caches = caches._replace(hca=hca)
            records = hca.records
            num_windows = step.batch.tables.records.shape[1] * records.page_size
            chosen = jnp.broadcast_to(jnp.arange(num_windows), (len(x), num_windows))
        values = read_records(step, records, request, chosen, own)
        keys = jnp.concatenate([keys, values.astype(keys.dtype)], axis=1)
        mask = jnp.concatenate([mask, visible_windows(step, chosen, ratio)], axis=1)

    out = attend(q, keys, mask, w["sinks"])
    # Values carry their rotation: it is undone at the query's position, up to the distance.
    out = rotate(out, cos_sin, inverse=True).reshape(len(x), config.o_groups, -1)
    o_a = w["o_a_proj.weight"].reshape(config.o_groups, -1, out.shape[-1])
    out = jnp.einsum("tgi,goi->tgo", out.astype(o_a.dtype), o_a).reshape(len(x), -1)
    return linear(out, w["o_b_proj.weight"]), caches


# --- The model --------------------------------------------------------------------------------


def forward(
    config: Config,
    params: Weights,
    caches: Caches,
    batch: Batch,
    *,
    page_tokens: int,
    next_n: int = 1,
    store_rows: LiveRows | str = "all",
    implementation: str | None = None,
    compressors: bool = True,
) -> tuple[Caches, Array, Array]:
    """One step: ``(caches, tokens [B, next_n], logits [B, next_n, vocab])``.

    Logits are those of each request's last ``next_n`` rows, and tokens the likeliest; where a
    request has fewer rows, the first of them mean nothing.
    """
    own = (page_tokens, store_rows, implementation, compressors)
    step = Step(config, batch, find_rows(batch), *own)
    tokens, eps = batch.tokens.reshape(-1), config.rms_norm_eps
    h = jnp.repeat(params["embed_tokens.weight"][tokens][:, None], config.hc_mult, axis=1)
    for layer, w in enumerate(params["layers"]):
        with jax.named_scope(f"layer {layer}"):
            x, post, comb = mix_streams(config, w["attn_hc"], h)
            x = rms_norm(x, w["input_layernorm.weight"], eps=eps)
            y, caches = attention(step, params, w["self_attn"], layer, x, caches)
            h = expand_streams(h, y, post, comb)
            x, post, comb = mix_streams(config, w["ffn_hc"], h)
            x = rms_norm(x, w["post_attention_layernorm.weight"], eps=eps)
            h = expand_streams(h, moe(config, w["mlp"], x, tokens), post, comb)

    if batch.cu_q_lens is None:
        first = jnp.arange(len(batch.kv_lens)) * batch.tokens.shape[1]
    else:
        first = batch.cu_q_lens[:-1]
    last = (first + batch.q_lens)[:, None] + jnp.arange(-next_n, 0)
    h = h[jnp.clip(last, 0, len(h) - 1).reshape(-1)]
    flat = rms_norm(h.reshape(len(h), -1).astype(jnp.float32), eps=eps)
    head = params["hc_head"]
    pre = jax.nn.sigmoid(linear(flat, head["hc_fn"]) * head["hc_scale"] + head["hc_base"])
    x = jnp.einsum("tn,tnh->th", pre + config.hc_eps, h.astype(jnp.float32)).astype(h.dtype)
    logits = linear(rms_norm(x, params["norm.weight"], eps=eps), params["lm_head.weight"])
    logits = logits.astype(jnp.float32).reshape(*last.shape, -1)
    return caches, logits.argmax(axis=-1).astype(jnp.int32), logits
