"""Weights: of a checkpoint's folder, of the small model beside this file, or random ones."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.engine.model import CSA, HCA, ROPE_DIM, Config, Weights
from jax_dsv4 import make_cos_sin_cache

TINY = pathlib.Path(__file__).with_name("tiny.npz")
RATIOS = {
    "sliding_attention": 0,
    "compressed_sparse_attention": CSA,
    "heavily_compressed_attention": HCA,
}
# A checkpoint on disk has DeepSeek's own names; these make transformers' of them, in this order.
RENAMES = [
    (r"^(model\.)?", ""),
    (r"^embed\.", "embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^hc_head_", "hc_head.hc_"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_", r".\1_hc."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.self_attn\.indexer\.(compressor\.)?", ".self_attn.compressor.indexer."),
    (r"\.indexer\.weights_proj\.", ".indexer.scorer.weights_proj."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"(compressor|indexer)\.norm\.", r"\1.kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wo_([ab])\.", r".o_\1_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"experts(\.\d+)?\.w1\.", r"experts\1.gate_proj."),
    (r"experts(\.\d+)?\.w2\.", r"experts\1.down_proj."),
    (r"experts(\.\d+)?\.w3\.", r"experts\1.up_proj."),
]
# Small, and used in f32: hyper-connections, routing, sinks, what goes to the compressors.
IN_F32 = re.compile(r"hc|\.gate\.|sinks$|position_bias$|kv_norm")


def make_config(hf: Mapping[str, Any]) -> Config:
    """From what ``config.json`` holds.

    Raises:
      ValueError: it does not say what each layer is; the text names the field.
    """
    names = {field.name for field in dataclasses.fields(Config)}
    given = {name: value for name, value in hf.items() if name in names and value is not None}
    field = "layer_types" if hf.get("layer_types") else "compress_ratios"
    if hf.get(field) is None:
        raise ValueError("config.json: expected layer_types or compress_ratios, got neither")
    num_layers = hf.get("num_hidden_layers")
    layers = list(hf[field])[:num_layers]
    if num_layers is not None and len(layers) < num_layers:
        raise ValueError(
            f"config.json: {field}: expected num_hidden_layers = {num_layers} entries, got "
            f"{len(layers)}"
        )
    kinds = RATIOS if field == "layer_types" else {ratio: ratio for ratio in RATIOS.values()}
    for kind in layers:
        if kind not in kinds:
            raise ValueError(f"config.json: {field}: expected one of {[*kinds]}, got {kind!r}")
    given["compress_ratios"] = tuple(kinds[kind] for kind in layers)
    if hf.get("mlp_layer_types"):
        given["num_hash_layers"] = hf["mlp_layer_types"].count("hash_moe")
    return Config(**given)


def make_params(
    hf: Mapping[str, Any],
    config: Config,
    read: Callable[[str], Any],
    *,
    max_len: int,
    dtype: Any,
) -> Weights:
    """All arrays of a model: ``read(name)`` under transformers' names, and tables of cos and sin.

    Raises:
      ValueError: a weight has another shape than the configuration says; the text names it.
    """
    tree: dict[str, Any] = {"layers": [{} for _ in config.compress_ratios], "hc_head": {}}
    for name, shape in list_shapes(config).items():
        value = read(name)
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
        if jnp.issubdtype(value.dtype, jnp.integer):
            value = jnp.asarray(value, jnp.int32)
        else:
            value = jnp.asarray(value, jnp.float32 if IN_F32.search(name) else dtype)
        owner = tree
        if name.startswith("layers."):
            _, layer, name = name.split(".", 2)
            owner = tree["layers"][int(layer)]
        part, _, rest = name.partition(".")
        if part in ("attn_hc", "ffn_hc", "self_attn", "mlp", "hc_head"):
            owner, name = owner.setdefault(part, {}), rest
        owner[name] = value
    for layer in tree["layers"]:
        fuse_projections(layer["self_attn"])
    rope = {
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "head_dim": config.head_dim,
        "partial_rotary_factor": ROPE_DIM / config.head_dim,
    } | {name: value for name, value in hf.items() if value is not None}
    for rope_kind in ("main", "compress"):
        table = make_cos_sin_cache(rope, max_len, rope=rope_kind)
        tree[f"cos_sin.{rope_kind}"] = jnp.asarray(table)
    return tree


def fuse_projections(attention: dict[str, Any]) -> None:
    """All columns that a layer's compressors need become one product: kv and gate of each."""
    parts = [
        attention.pop(name)
        for owner in ("compressor", "compressor.indexer")
        for name in (f"{owner}.kv_proj.weight", f"{owner}.gate_proj.weight")
        if name in attention
    ]
    if parts:
        attention["compressor.kv_score"] = jnp.concatenate(parts)


def load_tiny(*, max_len: int = 512) -> tuple[Config, Weights]:
    """The small model of the golden run: 4 layers of all kinds, 616,119 weights, f32."""
    with np.load(TINY) as file:
        meta = json.loads(bytes(file["meta"]))
        stored = {
            name.removeprefix("w.").removeprefix("model."): file[name]
            for name in file.files
            if name.startswith("w.")
        }
    scales = {name.removeprefix("model."): x for name, x in meta["exponent_offset"].items()}

    def read(name: str) -> np.ndarray:
        if name.endswith("tid2eid"):
            return stored[name].astype(np.int32)
        exponent, offset = scales[name]
        return (offset + stored[name] * 2.0**exponent).astype(np.float32)

    config = make_config(meta["config"])
    return config, make_params(meta["config"], config, read, max_len=max_len, dtype=jnp.float32)


def load_checkpoint(
    folder: str | pathlib.Path, *, max_len: int, dtype: Any = jnp.bfloat16
) -> tuple[Config, Weights]:
    """A folder with ``config.json`` and ``*.safetensors``, in DeepSeek's or transformers' names.

    Weights must be floating point. Those of the released checkpoints are not: they are quantised,
    and to be converted to bf16 first.

    Raises:
      ImportError: the package ``safetensors`` is not there.
      ValueError, KeyError, FileNotFoundError: the folder is no such checkpoint; the text says why.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("a checkpoint needs the package safetensors: pip install it") from error
    folder = pathlib.Path(folder)
    hf = json.loads((folder / "config.json").read_text())
    if hf.get("model_type") != "deepseek_v4":
        raise ValueError(
            f"{folder}: expected model_type 'deepseek_v4', got {hf.get('model_type')!r}"
        )
    config = make_config(hf)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: expected *.safetensors, found none")
    where: dict[str, tuple[Any, str]] = {}
    for path in files:
        file = safe_open(path, framework="numpy")
        for stored in file.keys():  # noqa: SIM118
            name = stored
            for pattern, target in RENAMES:
                name = re.sub(pattern, target, name)
            where[name] = file, stored
    if quantised := [name for name in where if re.search(r"((?<!_hc)\.scale|_scale_inv)$", name)]:
        raise ValueError(
            f"{folder}: expected weights in floating point, got quantised ones: {quantised[0]}; "
            "convert the checkpoint to bf16 first"
        )

    def get(name: str) -> Any:
        if name not in where:
            raise KeyError(f"{folder}: no weight {name}")
        file, stored = where[name]
        return file.get_tensor(stored)

    def read(name: str) -> Any:
        owner, is_of_experts, part = name.partition(".experts.")
        if name in where or not is_of_experts:
            return get(name)
        parts = ("gate", "up") if part == "gate_up_proj" else ("down",)
        experts = range(config.n_routed_experts)
        stacks = (
            np.stack([get(f"{owner}.experts.{e}.{own}_proj.weight") for e in experts])
            for own in parts
        )
        return np.concatenate(list(stacks), axis=1)

    return config, make_params(hf, config, read, max_len=max_len, dtype=dtype)


def list_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Of all weights of a model."""
    n, heads, size = c.hc_mult, c.num_attention_heads * c.head_dim, c.moe_intermediate_size
    mixes, streams = (2 + n) * n, n * c.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "hc_head.hc_fn": (n, streams),
        "hc_head.hc_base": (n,),
        "hc_head.hc_scale": (1,),
        "norm.weight": (c.hidden_size,),
        "lm_head.weight": (c.vocab_size, c.hidden_size),
    }
    for layer, ratio in enumerate(c.compress_ratios):
        own: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (c.hidden_size,),
            "post_attention_layernorm.weight": (c.hidden_size,),
            "self_attn.q_a_proj.weight": (c.q_lora_rank, c.hidden_size),
            "self_attn.q_a_norm.weight": (c.q_lora_rank,),
            "self_attn.q_b_proj.weight": (heads, c.q_lora_rank),
            "self_attn.kv_proj.weight": (c.head_dim, c.hidden_size),
            "self_attn.kv_norm.weight": (c.head_dim,),
            "self_attn.sinks": (c.num_attention_heads,),
            "self_attn.o_a_proj.weight": (c.o_groups * c.o_lora_rank, heads // c.o_groups),
            "self_attn.o_b_proj.weight": (c.hidden_size, c.o_groups * c.o_lora_rank),
            "mlp.gate.weight": (c.n_routed_experts, c.hidden_size),
            "mlp.experts.gate_up_proj": (c.n_routed_experts, 2 * size, c.hidden_size),
            "mlp.experts.down_proj": (c.n_routed_experts, c.hidden_size, size),
            "mlp.shared_experts.gate_proj.weight": (size, c.hidden_size),
            "mlp.shared_experts.up_proj.weight": (size, c.hidden_size),
            "mlp.shared_experts.down_proj.weight": (c.hidden_size, size),
        }
        for name in ("attn_hc", "ffn_hc"):
            own |= {f"{name}.fn": (mixes, streams), f"{name}.base": (mixes,), f"{name}.scale": (3,)}
        if layer < c.num_hash_layers:
            own["mlp.gate.tid2eid"] = (c.vocab_size, c.num_experts_per_tok)
        else:
            own["mlp.gate.e_score_correction_bias"] = (c.n_routed_experts,)
        parts = {"compressor": c.head_dim} if ratio else {}
        if ratio == CSA:
            parts["compressor.indexer"] = c.index_head_dim
            indexer = "self_attn.compressor.indexer"
            own[f"{indexer}.q_b_proj.weight"] = (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
            own[f"{indexer}.scorer.weights_proj.weight"] = (c.index_n_heads, c.hidden_size)
        for name, head_dim in parts.items():
            name, state_dim = f"self_attn.{name}", head_dim * (2 if ratio == CSA else 1)
            own[f"{name}.kv_proj.weight"] = own[f"{name}.gate_proj.weight"] = (
                state_dim,
                c.hidden_size,
            )
            own[f"{name}.position_bias"] = (ratio, state_dim)
            own[f"{name}.kv_norm.weight"] = (head_dim,)
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


def make_random(config: Config, *, max_len: int, dtype: Any, seed: int = 0) -> Weights:
    """Random weights of a model of any shape, made on the device: to time it, and for tests."""
    shapes = list_shapes(config)
    keys = dict(zip(shapes, jax.random.split(jax.random.key(seed), len(shapes)), strict=True))

    def read(name: str) -> jax.Array:
        shape = shapes[name]
        if name.endswith("tid2eid"):
            return jax.random.randint(keys[name], shape, 0, config.n_routed_experts)
        values = jax.random.normal(keys[name], shape, dtype)
        if "norm" in name or name.endswith("scale"):
            return 1 + values / 8
        return values * shape[-1] ** -0.5 if len(shape) > 1 else values

    return make_params({}, config, read, max_len=max_len, dtype=dtype)
