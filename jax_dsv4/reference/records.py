"""Records in plain jnp: norm, rotation, Hadamard transform, quantisers, and the bytes of a page.

Conversions work on bits, so that they are the same on every platform.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jax_dsv4._formats import ROPE_DIM, RecordFormat

_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_MAX_FLOAT = float(jnp.finfo(jnp.float32).max)


def store_records(
    values: Array,
    slots: Array,
    positions: Array,
    norm_weight: Array,
    cos_sin_cache: Array,
    pool: Array,
    layer: Array,
    *,
    format: RecordFormat,
    page_size: int,
    rms_norm_eps: float,
    rope_layout: str,
    hadamard: bool,
    rounding: str,
) -> tuple[Array]:
    """The pool with the records of ``values`` in their slots; empty arrays for what is absent."""
    if 0 in (values.shape[0], pool.size):
        return (pool,)
    records = values.astype(jnp.float32)
    step = _to_bf16 if rounding == "model" else lambda x: x
    records = step(records)
    if norm_weight.size:
        records = step(normalize(records, norm_weight, rms_norm_eps))
    exists = slots >= 0
    if cos_sin_cache.shape[0]:
        exists &= (positions >= 0) & (positions < cos_sin_cache.shape[0])
        records = step(rotate(records, positions, cos_sin_cache, rope_layout))
    if hadamard:
        records = step(transform_hadamard(records))
    if rounding == "once" and format.is_quantized:
        records = _to_bf16(records)
    return (write(pool, encode(records, format), slots, exists, layer, format, page_size),)


def dequantize_records(
    slots: Array, pool: Array, layer: Array, *, format: RecordFormat, page_size: int
) -> tuple[Array]:
    """The records in ``slots``, zeros where there is none."""
    if 0 in (slots.shape[0], pool.size):
        return (jnp.zeros((slots.shape[0], format.head_dim), jnp.float32),)
    data, scales, exists = read(pool, slots, layer, format, page_size)
    return (jnp.where(exists[:, None], decode(data, scales, format), 0),)


def normalize(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm over the last axis."""
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * (1 / jnp.sqrt(mean + eps)) * weight[None]


def rotate(x: Array, positions: Array, table: Array, layout: str) -> Array:
    """Interleaved rotary embedding of the last channels [N, D], by rows of ``table``."""
    half = ROPE_DIM // 2
    rows = table.at[positions].get(mode="clip")
    if layout == "halves":
        cos, sin = rows[:, :half], rows[:, half:]
    else:
        cos, sin = rows[:, ::2], rows[:, 1::2]
    even, odd = x[:, -ROPE_DIM::2], x[:, 1 - ROPE_DIM :: 2]
    rotated = jnp.stack((even * cos - odd * sin, odd * cos + even * sin), axis=-1)
    return jnp.concatenate((x[:, :-ROPE_DIM], rotated.reshape(-1, ROPE_DIM)), axis=-1)


def transform_hadamard(x: Array) -> Array:
    """The Walsh-Hadamard transform of the last axis in natural order, times D^-1/2."""
    dim = x.shape[-1]
    for log in range(dim.bit_length() - 1):
        pairs = x.reshape(x.shape[0], -1, 2, 2**log)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        x = jnp.stack((low + high, low - high), axis=2).reshape(x.shape[0], dim)
    return x * jnp.float32(dim**-0.5)


def encode(x: Array, format: RecordFormat) -> tuple[Array, Array]:
    """The bytes of records [N, D]: of their data, and of their scales. u8 [N, bytes] each."""
    none = jnp.zeros((x.shape[0], 0), jnp.uint8)
    if format.name == "f32":
        return _bytes_of(x), none
    if format.name == "bf16":
        return _bytes_of(x.astype(jnp.bfloat16)), none
    if format.name == "fp8":
        return to_e4m3(x), none
    if format.name == "fp8_ds_mla":
        plain, rotary = x[:, :-ROPE_DIM], x[:, -ROPE_DIM:]
        codes, exponents = _quantize_e4m3(plain, 64, format)
        data = jnp.concatenate((codes, _bytes_of(rotary.astype(jnp.bfloat16))), axis=-1)
        return data, jnp.pad(exponents, ((0, 0), (0, 1)))
    if format.name == "fp8_block128":
        return _quantize_e4m3(x, 128, format)
    return _quantize_e2m1(x)


def write(
    pool: Array,
    encoded: tuple[Array, Array],
    slots: Array,
    exists: Array,
    layer: Array,
    format: RecordFormat,
    page_size: int,
) -> Array:
    """The pool with these bytes in the slots that exist."""
    pages = pool.reshape(-1, pool.shape[-1])
    page = _find_pages(pool, slots, exists, layer, page_size)
    row = slots % page_size
    for data, start in zip(encoded, (0, page_size * format.data_bytes), strict=True):
        size = data.shape[-1]
        column = (start + row * size)[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
        pages = pages.at[page[:, None], column].set(data, mode="drop")
    return pages.reshape(pool.shape)


def read(
    pool: Array, slots: Array, layer: Array, format: RecordFormat, page_size: int
) -> tuple[Array, Array, Array]:
    """The bytes of the data and of the scales of records, and whether their slots exist."""
    pages = pool.reshape(-1, pool.shape[-1])
    page = _find_pages(pool, slots, slots >= 0, layer, page_size)
    row = slots % page_size
    parts = []
    sizes = format.data_bytes, format.scale_bytes
    for size, start in zip(sizes, (0, page_size * format.data_bytes), strict=True):
        column = (start + row * size)[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
        parts.append(pages.at[page[:, None], column].get(mode="fill", fill_value=0))
    return parts[0], parts[1], page < pages.shape[0]


def _find_pages(pool: Array, slots: Array, exists: Array, layer: Array, page_size: int) -> Array:
    """Of each slot, its page among those of all layers; past them where it is nowhere."""
    num_pages, nowhere = pool.shape[-2], pool.size // pool.shape[-1]
    page = slots // page_size
    exists = exists & (page < num_pages)
    first: Array | int = 0
    if layer.size:
        exists &= (layer >= 0) & (layer < pool.shape[0])
        first = layer * num_pages
    return jnp.where(exists, first + page, nowhere)


def decode(data: Array, scales: Array, format: RecordFormat) -> Array:
    """Records [N, D] in f32, from their bytes."""
    if format.name == "f32":
        return _from_bytes(data, jnp.float32)
    if format.name == "bf16":
        return _from_bytes(data, jnp.bfloat16).astype(jnp.float32)
    if format.name == "fp8":
        return from_e4m3(data)
    if format.name == "fp8_ds_mla":
        size = data.shape[-1] - 2 * ROPE_DIM
        plain = _scaled(from_e4m3(data[:, :size]), _power_of_two(scales[:, :-1]))
        rotary = _from_bytes(data[:, size:], jnp.bfloat16).astype(jnp.float32)
        return jnp.concatenate((plain, rotary), axis=-1)
    if format.name == "fp8_block128":
        if format.scales == "ue8m0":
            return _scaled(from_e4m3(data), _power_of_two(scales[:, ::4]))
        return _scaled(from_e4m3(data), _from_bytes(scales, jnp.float32))
    codes = jnp.stack((data & 15, data >> 4), axis=-1).reshape(data.shape[0], -1)
    values = _scaled(from_e2m1(codes), _power_of_two(scales))
    # The only product that is denormal, which arithmetic on a CPU takes for 0: half of 2^-126.
    least = (codes & 7 == 1) & (jnp.repeat(scales, 32, axis=-1) == 1)
    sign = (codes >> 3).astype(jnp.uint32) << 31
    half = jax.lax.bitcast_convert_type(sign | jnp.uint32(0x400000), jnp.float32)
    return jnp.where(least, half, values)


# -------------------------------------------------------------------------------------- quantisers


def _quantize_e4m3(x: Array, block: int, format: RecordFormat) -> tuple[Array, Array]:
    blocks = x.reshape(x.shape[0], -1, block)
    scale = _quotient(_amax(blocks, 0.0 if format.scale_floor else 1e-4), _E4M3_MAX)
    if format.has_power_of_two_scales:
        exponent = _exponent_above(scale)
        if format.scale_floor:
            exponent = jnp.maximum(exponent, 127 - 13)
        scale, reciprocal = _power_of_two(exponent), _power_of_two(254 - exponent)
    else:
        exponent, reciprocal = None, _quotient(1.0, scale)
    codes = to_e4m3(blocks * reciprocal[..., None]).reshape(x.shape)
    if exponent is None or format.scales == "power_of_two":
        return codes, _bytes_of(scale)
    exponents = exponent.astype(jnp.uint8)
    return codes, exponents if format.name == "fp8_ds_mla" else jnp.repeat(exponents, 4, axis=-1)


def _quantize_e2m1(x: Array) -> tuple[Array, Array]:
    blocks = x.reshape(x.shape[0], -1, 32)
    exponent = _exponent_above(_quotient(_amax(blocks, 6 * 2.0**-126), _E2M1_MAX))
    codes = to_e2m1(_divide_by_power_of_two(blocks, exponent[..., None])).reshape(x.shape)
    return codes[:, ::2] | codes[:, 1::2] << 4, exponent.astype(jnp.uint8)


def _divide_by_power_of_two(x: Array, exponent: Array) -> Array:
    """Exactly, denormal numbers included, which arithmetic on a CPU takes for 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    mantissa = (bits & 0x7FFFFF).astype(jnp.float32)
    denormal = mantissa * _power_of_two(jnp.maximum(127 - 22 - exponent, 0))
    denormal = jnp.where(bits < 0, -denormal, denormal)
    return jnp.where(bits >> 23 & 0xFF == 0, denormal, x * _power_of_two(254 - exponent))


def _amax(blocks: Array, floor: float) -> Array:
    """The largest magnitude of each block: without NaN, and at most the largest f32."""
    magnitudes = jnp.minimum(jnp.where(jnp.isnan(blocks), 0, jnp.abs(blocks)), _MAX_FLOAT)
    return jnp.maximum(jnp.max(magnitudes, axis=-1), jnp.float32(floor))


def _quotient(x: Array | float, y: Array | float) -> Array:
    """x / y of numbers that are not negative, correctly rounded where it is normal.

    By long division of mantissas: XLA's own division multiplies by reciprocals that it knows, and
    is off by a step in the last place on a GPU.
    """
    bits = [jax.lax.bitcast_convert_type(jnp.asarray(z, jnp.float32), jnp.int32) for z in (x, y)]
    dividend, divisor = ((z & 0x7FFFFF | 0x800000).astype(jnp.uint32) for z in bits)
    quotient, rest = dividend // divisor, dividend % divisor
    for digits in (8, 8, 8, 2):  # after the point; then 26 or 27 in all, and 24 are kept
        rest <<= digits
        quotient, rest = quotient << digits | rest // divisor, rest % divisor
    is_below_1 = (quotient < 1 << 26).astype(jnp.int32)
    quotient <<= is_below_1.astype(jnp.uint32)
    odd, beyond = quotient >> 3 & 1, (rest != 0).astype(jnp.uint32)
    mantissa = (quotient + 3 + (odd | beyond)) >> 3
    exponent = (bits[0] >> 23) - (bits[1] >> 23) + 127 - is_below_1
    return jax.lax.bitcast_convert_type(
        (exponent << 23) + (mantissa.astype(jnp.int32) - 0x800000), jnp.float32
    )


def _exponent_above(scale: Array) -> Array:
    """The biased exponent of the smallest power of two that is not below ``scale``; i32."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.int32)


def _power_of_two(exponent: Array) -> Array:
    return jax.lax.bitcast_convert_type(exponent.astype(jnp.int32) << 23, jnp.float32)


def _scaled(codes: Array, scales: Array) -> Array:
    blocks = codes.reshape(*scales.shape, -1) * scales[..., None]
    return blocks.reshape(codes.shape)


# ------------------------------------------------------------------------------------- conversions


def _to_bf16(x: Array) -> Array:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def to_e4m3(x: Array) -> Array:
    """The e4m3 code of each f32: to nearest even, saturating; of NaN 0x7F. u8."""
    return _to_minifloat(x, mantissa_bits=3, bias=7, largest=_E4M3_MAX, nan=0x7F)


def to_e2m1(x: Array) -> Array:
    """The e2m1 code of each f32: to nearest even, saturating; of NaN 7. u8."""
    return _to_minifloat(x, mantissa_bits=1, bias=1, largest=_E2M1_MAX, nan=7)


def _to_minifloat(x: Array, *, mantissa_bits: int, bias: int, largest: float, nan: int) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = bits >> 31
    magnitude = jnp.minimum(jnp.abs(x), largest)
    dropped = 23 - mantissa_bits
    kept = jax.lax.bitcast_convert_type(magnitude, jnp.uint32)
    rounded = kept + jnp.uint32(2 ** (dropped - 1) - 1) + (kept >> dropped & 1)
    normal = (rounded >> dropped) - jnp.uint32((127 - bias) << mantissa_bits)
    # Below the smallest normal number codes are multiples of the smallest number.
    subnormal = jnp.round(magnitude * 2.0 ** (bias - 1 + mantissa_bits)).astype(jnp.uint32)
    code = jnp.where(magnitude < 2.0 ** (1 - bias), subnormal, normal)
    code |= sign << (jnp.uint32(7) if largest == _E4M3_MAX else jnp.uint32(3))
    return jnp.where(jnp.isnan(x), jnp.uint32(nan), code).astype(jnp.uint8)


def from_e4m3(codes: Array) -> Array:
    """The f32 of each e4m3 code."""
    return _from_minifloat(codes, mantissa_bits=3, bias=7, sign_bit=7, nan=0x7F)


def from_e2m1(codes: Array) -> Array:
    """The f32 of each e2m1 code; they have no NaN."""
    return _from_minifloat(codes, mantissa_bits=1, bias=1, sign_bit=3, nan=None)


def _from_minifloat(
    codes: Array, *, mantissa_bits: int, bias: int, sign_bit: int, nan: int | None
) -> Array:
    code = codes.astype(jnp.uint32)
    magnitude = code & jnp.uint32(2**sign_bit - 1)
    normal = (magnitude << (23 - mantissa_bits)) + jnp.uint32((127 - bias) << 23)
    normal = jax.lax.bitcast_convert_type(normal, jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * 2.0 ** (1 - bias - mantissa_bits)
    value = jnp.where(magnitude < 2**mantissa_bits, subnormal, normal)
    if nan is not None:
        value = jnp.where(magnitude == nan, jnp.nan, value)
    return jnp.where(code >> sign_bit == 1, -value, value)


def _bytes_of(x: Array) -> Array:
    """[N, K] of any dtype as u8 [N, K times its bytes], little-endian.

    By shifts: of a bitcast that changes the shape, an exported program of any N cannot be run.
    """
    words = jax.lax.bitcast_convert_type(x, _word_of(x.dtype))
    return (words[..., None] >> _shifts_of(words.dtype)).astype(jnp.uint8).reshape(x.shape[0], -1)


def _from_bytes(data: Array, dtype: DTypeLike) -> Array:
    word = _word_of(dtype)
    each = data.reshape(data.shape[0], -1, word.itemsize).astype(word)
    words = jnp.sum(each << _shifts_of(word), axis=-1, dtype=word)
    return jax.lax.bitcast_convert_type(words, dtype)


def _word_of(dtype: DTypeLike) -> np.dtype:
    """The unsigned integer of as many bytes."""
    return np.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")


def _shifts_of(word: np.dtype) -> np.ndarray:
    """By how many bits each byte of a word is shifted: [1, 1, bytes]."""
    return 8 * np.arange(word.itemsize, dtype=word)[None, None]
