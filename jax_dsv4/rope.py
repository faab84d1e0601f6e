"""The table that records are rotated by, from a model's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_dsv4 import _check
from jax_dsv4._formats import ROPE_DIM, ROPE_LAYOUTS

_THETA_FIELDS = {"compress": "compress_rope_theta", "main": "rope_theta"}
# mscale and mscale_all_dim change nothing: neither DeepSeek's code nor transformers has them scale
# cos and sin of this model.
_ROPE_FIELDS = {
    "default": ("type", "rope_type", "rope_theta", "partial_rotary_factor"),
    "yarn": (
        *("type", "rope_type", "rope_theta", "partial_rotary_factor"),
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
}
_MAX_POSITION = 2**24  # f32 has no odd numbers past it
_F32_MAX = float(np.finfo(np.float32).max)


def make_cos_sin_cache(
    config: Any, max_position: int, *, rope: str = "compress", rope_layout: str = "halves"
) -> np.ndarray:
    """The table ``cos_sin_cache`` of DeepSeek-V4, from a Hugging Face configuration.

    Args:
      config: what ``config.json`` holds, as a mapping; or an object with these fields as
        attributes, as transformers' ``DeepseekV4Config`` is. Either spelling: ``rope_theta``,
        ``compress_rope_theta`` and ``rope_scaling``; or ``rope_parameters``, with an entry for each
        ``rope`` or with that of ``rope_scaling``. ``qk_rope_head_dim`` (or ``head_dim *
        partial_rotary_factor``) must be 64.
      max_position: rows of the table, of 256 bytes each: one more than the last position; at most
        2^24.
      rope: ``"compress"``: layers with a compressor (CSA and HCA): records, and their queries and
        sliding window; ``compress_rope_theta``, with YaRN if the configuration has it. ``"main"``:
        layers without one; ``rope_theta`` alone.
      rope_layout: as in ``store_records``.

    Returns:
      ``[max_position, 64]`` f32, an array of NumPy.

    Raises:
      ValueError, TypeError: a field is missing, unknown or not supported; the text names it.

    Precision: inverse frequencies and angles in f32, step by step as in DeepSeek's code and in
    transformers, vLLM and SGLang; cosines and sines correctly rounded. Angles in f64 would be
    better numbers, but queries are rotated by f32 angles, and only differences to those count. At
    position 10^6 the two are up to 0.05 apart.

    Cosines and sines are multiplied by ``attention_factor``, which is 1 where it is not given.

    YaRN: arXiv 2309.00071.
    """
    rows = _check.integer("max_position", max_position, 1, _MAX_POSITION)
    _check.choice("rope", rope, tuple(_THETA_FIELDS))
    _check.choice("rope_layout", rope_layout, ROPE_LAYOUTS)
    name, parameters = _find_parameters(config, rope)
    _check_rope_dim(config, name, parameters)
    rope_type = _checked_type(name, parameters)
    theta = _find_theta(config, rope, name, parameters)
    inv_freq, scale = _plain_inv_freq(theta), 1.0
    if rope_type == "yarn":
        inv_freq = _yarn_inv_freq(theta, name, parameters)
        if parameters.get("attention_factor") is not None:
            scale = _number(f"{name}.attention_factor", parameters["attention_factor"], 0)
    angles = np.arange(rows, dtype=np.float32)[:, None] * inv_freq
    table = np.empty((rows, ROPE_DIM), np.float32)
    half = ROPE_DIM // 2
    halves = {
        "halves": (table[:, :half], table[:, half:]),
        "interleaved": (table[:, ::2], table[:, 1::2]),
    }
    for function, out in zip((np.cos, np.sin), halves[rope_layout], strict=True):
        function(angles, out=out, dtype=np.float64, casting="same_kind")
    if scale != 1:
        table *= np.float32(scale)
    return table


def _get(config: Any, field: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(field)
    return getattr(config, field, None)


def _number(name: str, value: Any, above: float) -> float:
    if value is None:
        raise ValueError(f"{name}: missing")
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not above < value <= _F32_MAX or not above < np.float32(value):
        raise ValueError(f"{name}: expected a number of f32 above {above}, got {value!r}")
    return float(value)


def _find_parameters(config: Any, rope: str) -> tuple[str, Mapping[str, Any]]:
    """The fields of ``rope``'s frequencies, and where they are."""
    for field in ("rope_parameters", "rope_scaling"):
        found = _get(config, field)
        if found is None or found == {}:
            continue
        name = f"config.{field}"
        if isinstance(found, Mapping) and any(key in found for key in _THETA_FIELDS):
            name, found = f"{name}.{rope}", found.get(rope)
            if found is None:
                raise ValueError(f"{name}: missing")
        elif rope == "main":  # one set of fields, which is that of "compress"
            break
        if not isinstance(found, Mapping):
            raise TypeError(f"{name}: expected a mapping, got {type(found).__name__}")
        return name, found
    return "config", {}


def _check_rope_dim(config: Any, name: str, parameters: Mapping[str, Any]) -> None:
    dim, field = _get(config, "qk_rope_head_dim"), "config.qk_rope_head_dim"
    if dim is None:
        part, field = parameters.get("partial_rotary_factor"), f"{name}.partial_rotary_factor"
        if part is None:
            part, field = _get(config, "partial_rotary_factor"), "config.partial_rotary_factor"
        if part is None:
            raise ValueError("config.qk_rope_head_dim: missing")
        head_dim = _number("config.head_dim", _get(config, "head_dim"), 0)
        dim, field = int(head_dim * _number(field, part, 0)), f"{field} * head_dim"
    if _number(field, dim, 0) != ROPE_DIM:
        raise ValueError(f"{field}: expected {ROPE_DIM}, got {dim!r}")


def _checked_type(name: str, parameters: Mapping[str, Any]) -> str:
    given = (parameters.get(field) for field in ("rope_type", "type"))
    rope_type = next((value for value in given if value is not None), "default")
    _check.choice(f"{name}.rope_type", rope_type, tuple(_ROPE_FIELDS))
    for field, value in parameters.items():
        if value is not None and field not in _ROPE_FIELDS[rope_type]:
            raise ValueError(
                f"{name}.{field}: not a field of rope_type {rope_type!r}, which has "
                f"{', '.join(_ROPE_FIELDS[rope_type])}"
            )
    return rope_type


def _find_theta(config: Any, rope: str, name: str, parameters: Mapping[str, Any]) -> float:
    # Beside its fields rope_scaling may hold the other rope_theta, so an entry counts only where
    # there is one for each rope.
    if name.endswith(f".{rope}"):
        return _number(f"{name}.rope_theta", parameters.get("rope_theta"), 1)
    field = _THETA_FIELDS[rope]
    return _number(f"config.{field}", _get(config, field), 1)


# In f32 at each step. NumPy's own powers of f32 differ between machines: those of f64, rounded, do
# not, and are torch's for the two thetas of the model.


def _powers(theta: float) -> np.ndarray:
    exponents = np.arange(0, ROPE_DIM, 2) / ROPE_DIM
    return (np.float64(np.float32(theta)) ** exponents).astype(np.float32)


def _plain_inv_freq(theta: float) -> np.ndarray:
    return np.float32(1) / _powers(theta)


def _yarn_inv_freq(theta: float, name: str, parameters: Mapping[str, Any]) -> np.ndarray:
    """Frequencies that turn often are kept, those that turn little are divided by ``factor``."""

    def number(field: str, default: float | None = None) -> float:
        value = parameters.get(field)
        return _number(f"{name}.{field}", default if value is None else value, 0)

    length, factor = number("original_max_position_embeddings"), number("factor")

    def channel(turns: float) -> float:  # the pair of channels that makes so many turns in length
        return ROPE_DIM * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(number("beta_fast", 32))), 0)
    high = min(math.ceil(channel(number("beta_slow", 1))), ROPE_DIM - 1)
    width = high - low if high != low else 0.001
    pairs = np.arange(ROPE_DIM // 2, dtype=np.float32)
    kept = np.float32(1) - np.clip((pairs - np.float32(low)) / np.float32(width), 0, 1)
    divided = np.float32(1) / (np.float32(factor) * _powers(theta))
    return divided * (np.float32(1) - kept) + _plain_inv_freq(theta) * kept
