"""Bytes of records that stay what they are: tests/records.npz, in every implementation.

``python tests/test_records_golden.py`` makes that file: its operands, and the pools that the jnp
reference makes of them, each if float64 makes the same bytes.

The operands are chosen so that every step before the quantiser is exact in f32: values are integers
whose mean square is 64^2, weights and the table have few bits. So no order of a sum, and no fused
multiply-add, changes a byte.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_dsv4 import init_records, store_records

FILE = pathlib.Path(__file__).parent / "records.npz"
PAGE_SIZE, NUM_PAGES = 3, 2
FILL = 0xA5  # in all bytes that nothing is stored to
SLOTS = np.array([4, 0, -1, 5], np.int32)  # one of them goes nowhere
POSITIONS = np.array([3, 0, 1, 2], np.int32)
KINDS = {
    "f32": ("f32", 128, {}),
    "bf16": ("bf16", 128, {}),
    "fp8": ("fp8", 128, {}),
    "fp8_ds_mla": ("fp8_ds_mla", 512, {}),
    "fp8_ds_mla, scale_floor": ("fp8_ds_mla", 512, {"scale_floor": True}),
    "fp8_block128": ("fp8_block128", 128, {}),
    "fp8_block128, power_of_two": ("fp8_block128", 128, {"scales": "power_of_two"}),
    "fp8_block128, ue8m0": ("fp8_block128", 128, {"scales": "ue8m0"}),
    "mxfp4": ("mxfp4", 128, {}),
}
CHAINS = {
    "quantizer": {},
    "chain": {"rope_layout": "halves", "rounding": "once"},
    "chain, model": {
        "rope_layout": "interleaved",
        "rounding": "model",
        "rms_norm_eps": 3 * 64.0**2,
    },
    "hadamard": {"rope_layout": "halves", "rounding": "none", "hadamard": True},
    "hadamard, model": {"rope_layout": "interleaved", "rounding": "model", "hadamard": True},
}
CASES = [
    (kind, chain)
    for kind in KINDS
    for chain in CHAINS
    if not (kind.startswith("fp8_ds_mla") and "hadamard" in chain)
]


# ---------------------------------------------------------------------------------- the operands


def make_operands():
    """Integers and powers of two only: the same on every machine."""
    random = np.random.RandomState(0)
    operands = {}
    for dim in (128, 512):
        operands[f"values_{dim}"] = np.stack([make_row(random, dim) for _ in SLOTS])
        weight = random.randint(-16, 17, dim) / 8
        if dim == 512:  # blocks whose scale is the floor, or near it
            weight[64:128] = 0
            weight[128:192] *= 2.0**-20
            weight[192:256] *= 2.0**-15
        operands[f"weight_{dim}"] = weight
        operands[f"quantizer_{dim}"] = make_quantizer_rows(random, dim)
    angles = np.arange(4)[:, None] / 160000 ** (np.arange(32) / 32)
    halves = np.round(128 * np.concatenate((np.cos(angles), np.sin(angles)), 1)) / 128
    operands["table_halves"] = halves
    operands["table_interleaved"] = halves.reshape(4, 2, 32).swapaxes(1, 2).reshape(4, 64)
    return {name: x.astype(np.float32) for name, x in operands.items()}


def make_row(random, dim):
    """Integers below 256, in which bf16 is exact, whose mean square is 64^2."""
    while True:
        row = random.randint(-110, 111, dim)
        left = dim * 64**2 - np.sum(row[4:] ** 2)
        for a in range(255, 0, -1):
            for b in range(a, 0, -1):
                rest = left - a * a - b * b
                c = int(max(rest, 0) ** 0.5)
                d = int(max(rest - c * c, 0) ** 0.5)
                if rest == c * c + d * d and c < 256:
                    row[:4] = a, -b, c, d
                    return row[random.permutation(dim)]


def make_quantizer_rows(random, dim):
    """Halves of rows: of one magnitude, of many; of few bits (ties); small, and zeros."""
    shape = (len(SLOTS), dim // 2)
    left, right = np.ldexp(random.randint(-(2**23), 2**23, (2, *shape)), -22)
    right = np.ldexp(right, random.randint(-20, 12, shape))
    blocks = dim // 64
    left[1] = np.ldexp(random.randint(-31, 32, dim // 2), random.randint(-9, 9, blocks).repeat(32))
    right[1] = np.ldexp(left[1][::-1], 3)
    left[2], right[2] = 1, -1
    left[3] = np.ldexp(left[3], random.randint(-40, -10, blocks).repeat(32))
    left[3, ::5] = 0
    left[3, 1::5] = -0.0
    right[3] = 0
    return np.concatenate((left, right), 1)


def arguments_of(data, kind, chain):
    """Values, and the options of ``store_records``."""
    dim, options = KINDS[kind][1], dict(CHAINS[chain])
    if chain == "quantizer":
        return data[f"quantizer_{dim}"], options
    options["norm_weight"] = data[f"weight_{dim}"]
    options["cos_sin_cache"] = data[f"table_{options['rope_layout']}"]
    return data[f"values_{dim}"], options


# ------------------------------------------------------------------------------------- in float64


def to_bf16(x):
    return x.astype(ml_dtypes.bfloat16).astype(float)


def chain_in_float64(
    values,
    norm_weight=None,
    cos_sin_cache=None,
    rms_norm_eps=1e-6,
    rope_layout="",
    hadamard=False,
    rounding="once",
):
    """What the quantiser is given."""
    step = to_bf16 if rounding == "model" else np.array
    x = step(values.astype(float))
    if norm_weight is not None:
        eps = round(rms_norm_eps)  # 1e-6 is less than half a step of 64^2 in f32
        x = step(x / np.sqrt(np.mean(x * x, 1, keepdims=True) + eps) * norm_weight)
    if cos_sin_cache is not None:
        rows = cos_sin_cache[POSITIONS].astype(float)
        order = (2, 32) if rope_layout == "halves" else (32, 2)
        rows = rows.reshape(-1, *order)
        cos, sin = np.moveaxis(rows, 1 if order[0] == 2 else 2, 0)
        even, odd = x[:, -64::2], x[:, -63::2]
        turned = np.stack((even * cos - odd * sin, odd * cos + even * sin), 2)
        x[:, -64:] = turned.reshape(-1, 64)
        x = step(x)
    check_exact(x, sums=hadamard)
    if hadamard:
        dim = x.shape[1]
        signs = np.array([[(-1) ** (i & j).bit_count() for i in range(dim)] for j in range(dim)])
        x = step((x @ signs * np.float32(dim**-0.5)).astype(np.float32).astype(float))
    return x


def check_exact(x, sums):
    """These numbers, and if wanted all partial sums of each row, are numbers of f32."""
    assert np.all(x.astype(np.float32) == x)
    if sums:
        unit = 2.0**-16
        assert np.all(x % unit == 0) and np.all(np.abs(x).sum(1) <= 2**24 * unit)


def quantize_by_numpy(x, kind):
    """The bytes of data and of scales, [N, bytes] each."""
    format, _, options = KINDS[kind]
    scales = options.get("scales", "f32")
    none = np.zeros((len(x), 0), np.uint8)
    if format == "f32":
        return x.view(np.uint8), none
    if format == "bf16":
        return x.astype(ml_dtypes.bfloat16).view(np.uint8), none
    if format == "fp8":
        return to_codes(x, ml_dtypes.float8_e4m3fn), none
    if format == "fp8_ds_mla":
        floors = (0, 2.0**-13) if options else (1e-4, 0)
        codes, scale = quantize_blocks(x[:, :448], 64, ml_dtypes.float8_e4m3fn, *floors, True)
        rotary = x[:, 448:].astype(ml_dtypes.bfloat16).view(np.uint8)
        return np.concatenate((codes, rotary), 1), np.pad(to_ue8m0(scale), ((0, 0), (0, 1)))
    if format == "fp8_block128":
        codes, scale = quantize_blocks(
            x, 128, ml_dtypes.float8_e4m3fn, 1e-4, 0, power_of_two=scales != "f32"
        )
        return codes, to_ue8m0(scale).repeat(4, 1) if scales == "ue8m0" else scale.view(np.uint8)
    codes, scale = quantize_blocks(x, 32, ml_dtypes.float4_e2m1fn, 6 * 2.0**-126, 0, True)
    return codes[:, ::2] + 16 * codes[:, 1::2], to_ue8m0(scale)


def quantize_blocks(x, size, dtype, amax_floor, scale_floor, power_of_two):
    blocks = x.reshape(len(x), -1, size)
    amax = np.maximum(np.abs(blocks).max(2), np.float32(amax_floor))
    scale = amax / np.float32(ml_dtypes.finfo(dtype).max)
    scale = np.maximum(scale, np.float32(scale_floor))
    if power_of_two:
        mantissa, exponent = np.frexp(scale)  # in [0.5, 1)
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    return to_codes(blocks * (1 / scale)[:, :, None], dtype).reshape(x.shape), scale


def to_codes(x, dtype):
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    return np.clip(x, -largest, largest).astype(dtype).view(np.uint8)


def to_ue8m0(scale):
    return (np.frexp(scale)[1] + 126).astype(np.uint8)


def pool_by_numpy(data, kind, chain):
    values, options = arguments_of(data, kind, chain)
    pool = empty_pool(kind)
    records = chain_in_float64(values, **options)
    if options.get("rounding", "once") == "once" and KINDS[kind][0] not in ("f32", "bf16"):
        records = to_bf16(records)
    parts = quantize_by_numpy(records.astype(np.float32), kind)
    start = 0
    for part in parts:
        size = part.shape[1]
        for row, slot in zip(part, SLOTS, strict=True):
            if slot >= 0:
                at = start + slot % PAGE_SIZE * size
                pool[slot // PAGE_SIZE, at : at + size] = row
        start += PAGE_SIZE * size
    return pool


# ---------------------------------------------------------------------------------------- the test


def cache_of(kind):
    format, dim, options = KINDS[kind]
    cache = init_records(NUM_PAGES, PAGE_SIZE, head_dim=dim, format=format, **options)
    return dataclasses.replace(cache, pool=jnp.full(cache.pool.shape, FILL, jnp.uint8))


def empty_pool(kind):
    return np.array(cache_of(kind).pool)


def pool_of(data, kind, chain, implementation, device):
    values, options = arguments_of(data, kind, chain)
    operands = jax.device_put((values, SLOTS, POSITIONS, cache_of(kind)), device)
    call = jax.jit(lambda *x: store_records(*x, **options, implementation=implementation))
    return np.asarray(call(*operands).pool)


@pytest.fixture(scope="module")
def data():
    return np.load(FILE)


@pytest.mark.parametrize("implementation", ("ffi", "xla"))
@pytest.mark.parametrize(("kind", "chain"), CASES)
def test_the_bytes_are_those_of_the_file(kind, chain, implementation, device, data):
    got = pool_of(data, kind, chain, implementation, device)
    np.testing.assert_array_equal(got, data[f"{kind}: {chain}"])


@pytest.mark.parametrize(("kind", "chain"), CASES)
def test_the_bytes_of_the_file_are_those_of_float64(kind, chain, data):
    np.testing.assert_array_equal(pool_by_numpy(data, kind, chain), data[f"{kind}: {chain}"])


def test_the_operands_of_the_file_are_the_makers(data):
    operands = make_operands()
    for name, want in operands.items():
        np.testing.assert_array_equal(data[name], want)
        assert np.array_equal(np.signbit(data[name]), np.signbit(want))
    assert set(data) == set(operands) | {f"{kind}: {chain}" for kind, chain in CASES}


def test_every_choice_changes_bytes(data):
    pools = [data[f"{kind}: {chain}"].tobytes() for kind, chain in CASES]
    assert len(set(pools)) == len(pools)


if __name__ == "__main__":
    arrays = make_operands()
    for kind, chain in CASES:
        pool = pool_of(arrays, kind, chain, "xla", jax.devices("cpu")[0])
        np.testing.assert_array_equal(pool, pool_by_numpy(arrays, kind, chain), f"{kind}: {chain}")
        arrays[f"{kind}: {chain}"] = pool
    np.savez_compressed(FILE, **arrays)
