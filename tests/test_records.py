"""Records: the bytes that other projects' own code makes of the same values."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checks import COLLECTIVE, with_or_without_cuda
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_dsv4 import (
    EXPORT_DISABLED_CHECKS,
    RecordCache,
    dequantize_records,
    init_records,
    store_records,
)
from jax_dsv4.records import DEQUANTIZE, STORE
from jax_dsv4.reference import records as reference

GOLDEN = pathlib.Path(__file__).parents[2] / "shared" / "golden"


def golden(name):
    path = GOLDEN / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no {path}: other projects' bytes are not part of this repository")
    return np.load(path)


def of_bf16(bits):
    return bits.view(ml_dtypes.bfloat16).astype(np.float32)


def cache_of(pool, format, head_dim, page_size, **options):
    num_pages, stride = pool.shape
    cache = init_records(
        num_pages, int(page_size), head_dim=head_dim, format=format, page_bytes=stride, **options
    )
    return dataclasses.replace(cache, pool=jnp.full(pool.shape, 0xA5, jnp.uint8))


@pytest.fixture(params=("ffi", "xla"))
def stored(request, device):
    """(values, slots, positions, cache, **options) -> the pool, by either implementation."""

    step = jax.jit(
        functools.partial(store_records, implementation=request.param),
        static_argnames=("rms_norm_eps", "rope_layout", "hadamard", "rounding"),
    )

    def stored(values, slots, positions, cache, **options):
        operands = (values, np.asarray(slots, np.int32), np.asarray(positions, np.int32), cache)
        return np.asarray(step(*jax.device_put(operands, device), **options).pool)

    return stored


def used_bytes(cache, slots):
    """Which bytes of the pool belong to the records in these slots."""
    kind, size = cache._kind, cache.page_size
    used = np.zeros(cache.pool.shape, bool)
    for slot in slots[slots >= 0]:
        page, row = divmod(int(slot), size)
        used[page, row * kind.data_bytes : (row + 1) * kind.data_bytes] = True
        start = size * kind.data_bytes + row * kind.scale_bytes
        used[page, start : start + kind.scale_bytes] = True
    return used


def check_quantizer(stored, values, pool, format, head_dim, page_size, slots=None, **options):
    """Equal bytes in every record, and no other byte touched."""
    slots = np.arange(len(values)) if slots is None else slots
    cache = cache_of(pool, format, head_dim, page_size, **options)
    got = stored(values, slots, np.zeros(len(values), np.int32), cache)
    used = used_bytes(cache, slots)
    np.testing.assert_array_equal(got[used], pool[used])
    assert np.all(got[~used] == 0xA5)


# ------------------------------------------------------------------------------------ conversions


def test_e4m3_is_nvidias():
    data = golden("records_fp8")
    for values, codes in (("values", "codes_nvidia"), ("edge_values", "edge_codes_nvidia")):
        got, want = np.asarray(reference.to_e4m3(data[values])), data[codes]
        nan = np.isnan(data[values])
        np.testing.assert_array_equal(got[~nan], want[~nan])
        np.testing.assert_array_equal(got[nan] & 0x7F, 0x7F)
    np.testing.assert_array_equal(
        np.asarray(reference.from_e4m3(data["edge_codes_nvidia"])), data["edge_codes_float"]
    )


SMALL = {"e4m3": ml_dtypes.float8_e4m3fn, "e2m1": ml_dtypes.float4_e2m1fn}


def conversion_inputs():
    yield of_bf16(np.arange(2**16, dtype=np.uint16))
    rng = np.random.default_rng(0)
    for _ in range(10):
        yield rng.integers(0, 2**32, 10**6, np.uint64).astype(np.uint32).view(np.float32)


def check_codes(got, values, dtype):
    """Those of ml_dtypes, which makes NaN of what is past the largest number."""
    nan = np.isnan(values)
    largest = float(ml_dtypes.finfo(dtype).max)
    want = np.clip(np.where(nan, 0, values), -largest, largest).astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(got[~nan], want[~nan])
    assert np.all(got[nan] & 0x7F == 0x7F) if dtype == SMALL["e4m3"] else np.all(got[nan] & 7 == 7)


@pytest.mark.parametrize("name", SMALL)
def test_conversions_are_those_of_ml_dtypes(name):
    dtype = SMALL[name]
    to_codes = {"e4m3": reference.to_e4m3, "e2m1": reference.to_e2m1}[name]
    from_codes = {"e4m3": reference.from_e4m3, "e2m1": reference.from_e2m1}[name]
    for values in conversion_inputs():
        check_codes(np.asarray(jax.jit(to_codes)(values)), values, dtype)
    codes = np.arange(256 if name == "e4m3" else 16, dtype=np.uint8)
    np.testing.assert_array_equal(
        np.asarray(from_codes(codes)), codes.view(dtype).astype(np.float32)
    )


def stored_data(values, format, device):
    """The data of the values' records, as the kernel makes them: bytes [N, ...]."""
    count, head_dim = values.shape
    cache = init_records(1, count, head_dim=head_dim, format=format)
    cache = dataclasses.replace(cache, pool=jnp.full(cache.pool.shape, 0xA5, jnp.uint8))
    slots = np.arange(count, dtype=np.int32)
    call = jax.jit(functools.partial(store_records, rounding="none", implementation="ffi"))
    pool = np.asarray(call(*jax.device_put((values, slots, slots, cache), device)).pool)
    return pool[0, : count * cache._kind.data_bytes].reshape(count, -1)


def in_rows(values, size):
    """As rows of this size, the last filled up with the first values."""
    return np.resize(values, (-(-values.size // size), size))


@np.errstate(invalid="ignore")  # conversions of signalling NaN
def test_the_kernel_converts_to_bf16_and_e4m3_as_ml_dtypes(device):
    for values in conversion_inputs():
        values = in_rows(values, 512)
        got = stored_data(values, "bf16", device).view(ml_dtypes.bfloat16)
        nan, want = np.isnan(values), values.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(got.view(np.uint16)[~nan], want.view(np.uint16)[~nan])
        assert np.all(np.isnan(got[nan]))
        check_codes(stored_data(values, "fp8", device), values, SMALL["e4m3"])


@np.errstate(invalid="ignore")
@pytest.mark.parametrize("exponent", (-126, -125, -1, 0, 125))
def test_the_kernel_converts_to_e2m1_as_ml_dtypes(exponent, device):
    """In blocks whose scale is this power of two: one value is 6 of it, none is larger."""
    largest = np.ldexp(np.float32(6), exponent)
    for values in conversion_inputs():
        values = np.clip(in_rows(values, 31 * 16).reshape(-1, 31), -largest, largest)
        values = np.insert(values, 0, largest, axis=1)
        got = stored_data(values.reshape(-1, 512), "mxfp4", device)
        got = np.stack((got & 15, got >> 4), -1).reshape(values.shape)
        check_codes(got, np.ldexp(values, -exponent), SMALL["e2m1"])


# --------------------------------------------------------------------------------------- the steps


def read_back(pool, cache, slots):
    cache = dataclasses.replace(cache, pool=jnp.asarray(pool))
    return np.asarray(dequantize_records(cache, np.asarray(slots, np.int32)))


@pytest.mark.parametrize("head_dim", (128, 512))
def test_norm_and_rotation_are_those_of_transformers(head_dim, stored):
    data = golden("records_f32_bf16")
    d = f"d{head_dim}_"
    values, positions = data[d + "values"], data[d + "positions"]
    slots = np.arange(len(values))
    norm = {"norm_weight": data[d + "weight"], "rms_norm_eps": 1e-6}
    for layout in ("halves", "interleaved"):
        turn = {"cos_sin_cache": data[f"table_{layout}"], "rope_layout": layout}
        cache = init_records(2, 5, head_dim=head_dim, format="f32")
        normed = read_back(stored(values, slots, positions, cache, **norm), cache, slots)
        np.testing.assert_allclose(normed, data[d + "normed_hf"], rtol=4e-7)
        rotated = read_back(stored(values, slots, positions, cache, **norm, **turn), cache, slots)
        want = data[d + "rotated_hf"]
        assert np.all(np.abs(rotated - want) <= 4e-7 * np.abs(want).max(1, keepdims=True))
        cache = init_records(2, 5, head_dim=head_dim, format="bf16")
        got = stored(values, slots, positions, cache, **norm, **turn)
        want = data[d + "rotated_hf_bf16"].reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(got.reshape(-1)[: want.size], want)


def test_the_hadamard_transform_is_the_reference_one(stored):
    data = golden("records_f32_bf16")
    values, want = data["d128_rotated_hf"], data["d128_hadamard_ref"]
    slots = np.arange(len(values))
    cache = init_records(1, 8, head_dim=128, format="f32")
    got = read_back(stored(values, slots, slots, cache, hadamard=True), cache, slots)
    assert np.all(np.abs(got - want) <= 1e-6 * np.abs(want).max(1, keepdims=True))


# ---------------------------------------------------------------------------------- the quantisers


def test_fp8_ds_mla_is_flashmlas_and_vllms(stored):
    data = golden("records_fp8_ds_mla")
    values = of_bf16(data["values"])
    pool, page_size = data["pool_scale_floor_flashmla"], data["page_size"]
    check_quantizer(stored, values, pool, "fp8_ds_mla", 512, page_size, scale_floor=True)
    check_quantizer(
        stored,
        values,
        data["pool_amax_floor_vllm"],
        "fp8_ds_mla",
        512,
        data["page_size_2"],
        data["slots_2"],
    )
    cache = dataclasses.replace(
        init_records(1, int(page_size), head_dim=512, format="fp8_ds_mla"), pool=jnp.asarray(pool)
    )
    got = dequantize_records(cache, np.arange(16, dtype=np.int32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), data["dequant_flashmla"])


def test_fp8_block128_is_deepgemms(stored):
    data = golden("records_fp8_block128")
    values, pool = of_bf16(data["values"]), data["pool_deepgemm"]
    check_quantizer(stored, values, pool, "fp8_block128", 128, data["page_size"])
    cache = RecordCache(jnp.asarray(pool), "fp8_block128", 128, int(data["page_size"]))
    got = dequantize_records(cache, np.arange(32, dtype=np.int32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), data["dequant_deepgemm"])
    slots = np.arange(16)
    cache = cache_of(data["pool_f32_deepgemm"], "fp8_block128", 128, 16)
    got = stored(data["values_f32"], slots, slots, cache, rounding="none")
    np.testing.assert_array_equal(got, data["pool_f32_deepgemm"])


def test_fp8_block128_with_powers_of_two_is_tilekernels(stored):
    data = golden("records_fp8_block128")
    values = of_bf16(data["values"])
    slots = np.arange(64)
    cache = init_records(1, 64, head_dim=128, format="fp8_block128", scales="power_of_two")
    got = stored(values, slots, slots, cache)[0]
    codes, scales = got[: 64 * 128].reshape(64, 128), got[64 * 128 :].view(np.float32)
    np.testing.assert_array_equal(codes, data["codes_pow2_tilekernels"])
    np.testing.assert_array_equal(scales, data["scales_pow2_tilekernels"])


def test_mxfp4_is_tilekernels(stored):
    data = golden("records_mxfp4")
    values = of_bf16(data["values"])
    slots = np.arange(64)
    cache = init_records(1, 64, head_dim=128, format="mxfp4")
    got = stored(values, slots, slots, cache)[0]
    codes, scales = got[: 64 * 64].reshape(64, 64), got[64 * 64 :].reshape(64, 4)
    np.testing.assert_array_equal(codes, data["codes_tilekernels"])
    np.testing.assert_array_equal(scales, data["scales_tilekernels"])
    cache = dataclasses.replace(cache, pool=jnp.asarray(got[None]))
    got = dequantize_records(cache, np.arange(32, dtype=np.int32))
    np.testing.assert_array_equal(got, data["dequant_tilekernels"])


# ----------------------------------------------------------------------------------- whole chains


CHAINS = {
    "fp8_ds_mla, vLLM CPU": (
        "fp8_ds_mla",
        "chain_pool_scale_floor_vllm_cpu",
        {"scale_floor": True},
    ),
    "fp8_ds_mla, vLLM": ("fp8_ds_mla", "chain_pool_amax_floor_vllm", {}),
    "fp8_block128, vLLM CPU": (
        "fp8_block128",
        "chain_pool_pow2_vllm_cpu",
        {"scales": "power_of_two"},
    ),
    "fp8_block128, vLLM on SM100": ("fp8_block128", "chain_pool_mx_vllm", {"scales": "ue8m0"}),
    "mxfp4, vLLM": ("mxfp4", "chain_pool_vllm", {}),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_whole_chains(chain, stored):
    format, name, options = CHAINS[chain]
    data, tables = golden(f"records_{format}"), golden("records_f32_bf16")
    values, slots = data["chain_values"], data["chain_slots"]
    for layout in ("halves", "interleaved"):
        cache = cache_of(data[name], format, values.shape[1], data["chain_page_size"], **options)
        got = stored(
            values,
            slots,
            data["chain_positions"],
            cache,
            norm_weight=data["chain_weight"],
            cos_sin_cache=tables[f"table_{layout}"],
            rope_layout=layout,
        )
        np.testing.assert_array_equal(got, data[name])


@pytest.mark.parametrize("format", ("fp8_ds_mla", "mxfp4"))
def test_deepseeks_own_rounding(format, stored):
    data, tables = golden(f"records_{format}"), golden("records_f32_bf16")
    values = of_bf16(data["every_step_values"])
    count, head_dim = values.shape
    slots = np.arange(count)
    options = {
        "norm_weight": data["every_step_weight"],
        "cos_sin_cache": tables["table_halves"],
        "rounding": "model",
        "hadamard": format == "mxfp4",
    }
    positions = data["every_step_positions"]
    plain = stored(
        values,
        slots,
        positions,
        init_records(1, count, head_dim=head_dim, format="bf16"),
        **options,
    )
    np.testing.assert_array_equal(
        plain.view(np.uint16).reshape(count, head_dim), data["every_step_result_bf16"]
    )
    cache = init_records(1, count, head_dim=head_dim, format=format, scale_floor=format != "mxfp4")
    got = stored(values, slots, positions, cache, **options)
    if format == "fp8_ds_mla":
        used = used_bytes(cache, slots)
        np.testing.assert_array_equal(got[used], data["every_step_pool_flashmla"][used])
    else:
        codes, scales = got[0, : 64 * count], got[0, 64 * count :]
        np.testing.assert_array_equal(
            codes.reshape(count, 64), data["every_step_codes_tilekernels"]
        )
        np.testing.assert_array_equal(
            scales.reshape(count, 4), data["every_step_scales_tilekernels"]
        )


def test_without_rounding_it_is_tensorrts(stored):
    data, tables = golden("records_mxfp4"), golden("records_f32_bf16")
    values = of_bf16(data["f32_chain_values"])
    count = len(values)
    cache = init_records(1, count, head_dim=128, format="mxfp4")
    got = stored(
        values,
        np.arange(count),
        data["f32_chain_positions"],
        cache,
        norm_weight=data["every_step_weight"],
        cos_sin_cache=tables["table_halves"],
        hadamard=True,
    )[0]
    codes, scales = got[: 64 * count].reshape(count, 64), got[64 * count :].reshape(count, 4)
    np.testing.assert_array_equal(codes, data["f32_chain_codes_tensorrt"])
    np.testing.assert_array_equal(scales, data["f32_chain_scales_tensorrt"])


def test_sglangs_indexer(stored):
    data, tables = golden("records_fp8_block128"), golden("records_f32_bf16")
    want, page_size = data["sglang_pool"], int(data["sglang_page_size"])
    cache = cache_of(want, "fp8_block128", 128, page_size)
    got = stored(
        data["sglang_values"],
        data["sglang_slots"],
        data["sglang_positions"],
        cache,
        norm_weight=data["chain_weight"],
        cos_sin_cache=tables["table_interleaved"],
        rope_layout="interleaved",
        hadamard=True,
    )
    size = page_size * 128
    np.testing.assert_array_equal(got[:, :size], want[:, :size])
    got, want = (x[:, size:].copy().view(np.int32) for x in (got, want))
    assert np.abs(got - want).max() <= 4  # units in the last place


# ------------------------------------------------------------------------------- as an operation


KINDS = (
    ("f32", 128, {}),
    ("bf16", 512, {}),
    ("fp8", 128, {}),
    ("fp8_ds_mla", 512, {}),
    ("fp8_ds_mla", 512, {"scale_floor": True}),
    ("fp8_block128", 128, {}),
    ("fp8_block128", 512, {"scales": "ue8m0"}),
    ("mxfp4", 128, {}),
    ("mxfp4", 512, {}),
)


def name_of(kind):
    format, head_dim, options = kind
    return "-".join((format, str(head_dim), *options))


def case(kind, page_size=5, extra=0, seed=0, count=23, num_pages=4):
    """Operands of a step, some of which go nowhere, and a cache full of something."""
    format, head_dim, options = kind
    rng = np.random.default_rng(seed)
    needed = init_records(0, page_size, head_dim=head_dim, format=format, **options).pool.shape[1]
    cache = init_records(
        num_pages, page_size, head_dim=head_dim, format=format, page_bytes=needed + extra, **options
    )
    cache = dataclasses.replace(cache, pool=jnp.full(cache.pool.shape, 0xA5, jnp.uint8))
    values = rng.standard_normal((count, head_dim), np.float32) * np.float32(10) ** rng.integers(
        -6, 6, (count, 1)
    ).astype(np.float32)
    slots = rng.permutation(num_pages * page_size + count).astype(np.int32)[:count] - 5
    positions = rng.integers(-2, 40, count).astype(np.int32)
    angles = rng.standard_normal((37, 32))
    table = np.concatenate((np.cos(angles), np.sin(angles)), -1).astype(np.float32)
    weight = rng.standard_normal(head_dim, np.float32)
    return (values, slots, positions, cache), {"norm_weight": weight, "cos_sin_cache": table}


def stores(operands, arrays, **options):
    return store_records(*operands, **arrays, **options)


@pytest.mark.parametrize("extra", (0, 4, 64))
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_no_other_byte_is_written(kind, extra, stored, request):
    """By the kernel in 1,000 random cases and more."""
    num_seeds = 10 if "ffi" in request.node.callspec.id else 2
    for page_size in (1, 3, 6, 64):
        for seed in range(num_seeds):
            (values, slots, positions, cache), arrays = case(kind, page_size, extra, seed)
            got = stored(values, slots, positions, cache, **arrays)
            exists = (positions >= 0) & (positions < 37) & (slots < 4 * page_size)
            used = used_bytes(cache, np.where(exists, slots, -1))
            assert np.all(got[~used] == 0xA5)
            assert used.any() and np.mean(got[used] == 0xA5) < 0.05


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_the_kernel_makes_the_references_records(kind, dtype, device):
    """But for a step of the format, where the order of a sum decides."""
    (values, slots, positions, cache), arrays = case(kind, count=400, num_pages=100)
    values = jnp.asarray(values, dtype)
    for hadamard in {False, kind[0] != "fp8_ds_mla"}:
        for rounding in ("once", "none", "model"):
            options = {"hadamard": hadamard, "rounding": rounding}
            got, want = (
                np.asarray(
                    jax.jit(functools.partial(stores, **options, implementation=i))(
                        *jax.device_put(((values, slots, positions, cache), arrays), device)
                    ).pool
                )
                for i in ("ffi", "xla")
            )
            written = slots[(slots >= 0) & (slots < 500)]
            got_values, want_values = (read_back(x, cache, written) for x in (got, want))
            if kind[0] == "f32":
                scale = np.abs(want_values).max(1, keepdims=True)
                assert np.all(np.abs(got_values - want_values) <= 2e-6 * scale)
            else:
                # A scale in f32 has the last bits of a sum, and decides on all codes of its block.
                last_bits = kind[0] == "fp8_block128" or rounding == "none"
                assert np.mean(got != want) < (0.02 if last_bits else 1e-3)
                np.testing.assert_allclose(
                    got_values, want_values, rtol=0.51, atol=1e-2 * np.abs(want_values).max()
                )


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_what_comes_back_is_within_the_formats_rounding(kind, device):
    format, head_dim, _ = kind
    rng = np.random.default_rng(1)
    count = 60
    normal = rng.standard_normal((count, head_dim))
    block = np.repeat(rng.standard_normal((count, head_dim // 32)), 32, axis=1)
    step = {"f32": 2**-24, "bf16": 2**-8, "mxfp4": 2**-1}.get(format, 2**-3) / 2
    for values in (normal, rng.standard_t(2, (count, head_dim)), block):
        values = values.astype(jnp.bfloat16).astype(np.float32)
        (_, _, _, cache), _ = case(kind, page_size=60, num_pages=1)
        slots = np.arange(count, dtype=np.int32)
        with jax.default_device(device):
            got = np.asarray(dequantize_records(store_records(values, slots, slots, cache), slots))
        size = {"fp8_ds_mla": 64, "fp8_block128": 128, "mxfp4": 32}.get(format, 1)
        amax = np.abs(values).reshape(count, -1, size).max(-1).repeat(size, -1)
        # Half a step of the value itself; half the smallest step of its block's scale, which is at
        # most twice amax over the largest number; and saturation, where there is one scale for all.
        smallest = {"mxfp4": amax / 6, "fp8": 2**-9}.get(format, amax / 448 * 2**-8)
        bound = step * np.abs(values) * (1 + 2**-8) + smallest
        assert np.all(np.abs(got - values) <= bound)


def test_values_that_are_not_finite_stay_in_their_block(device):
    for kind in KINDS:
        (_, _, _, cache), _ = case(kind, page_size=4, num_pages=1)
        values = np.ones((4, kind[1]), np.float32)
        values[1, 3], values[2, 3], values[3, 3] = np.nan, np.inf, -np.inf
        slots = np.arange(4, dtype=np.int32)
        with jax.default_device(device):
            pool = store_records(values, slots, slots, cache).pool
        got = read_back(pool, cache, slots)
        np.testing.assert_array_equal(got[0], 1)
        np.testing.assert_array_equal(got[1:, 128:], 1)
        assert np.all(np.isfinite(got[1:, 4:]))
        if kind[0] != "mxfp4":  # which has no NaN
            assert np.isnan(got[1, 3])
        assert got[2, 3] > 1 and got[3, 3] < -1
        scales = np.asarray(pool)[0, 4 * cache._kind.data_bytes : cache._kind.page_bytes(4)]
        if cache._kind.has_power_of_two_scales and kind[2].get("scales") != "f32":
            assert not np.any(scales == 255)


def test_the_donated_pool_is_updated_in_place_in_every_loop():
    operands, arrays = case(("fp8_ds_mla", 512, {}))
    values, slots, positions, cache = operands
    program = jax.jit(lambda cache, *rest: stores((*rest, cache), arrays), donate_argnums=0)
    compiled = program.lower(cache, values, slots, positions).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.pool.nbytes
    assert " copy(" not in compiled.as_text()

    def scanned(cache, rows, arrays):
        def step(cache, row):
            return stores((row, slots, positions, cache), arrays), None

        return jax.lax.scan(step, cache, rows)[0]

    rows = np.stack([values, 2 * values])
    text = jax.jit(scanned, donate_argnums=0).lower(cache, rows, arrays).compile().as_text()
    assert not re.findall(rf"= u8\[{','.join(map(str, cache.pool.shape))}\]\S* copy\(", text)
    want = stores((2 * values, slots, positions, cache), arrays)
    np.testing.assert_array_equal(scanned(cache, rows, arrays).pool, want.pool)


@pytest.mark.parametrize("implementation", ("ffi", "xla"))
@pytest.mark.parametrize("kind", KINDS[::3], ids=name_of)
def test_vmap_is_a_loop_and_one_call(kind, implementation):
    groups = [case(kind, seed=seed) for seed in range(3)]
    arrays = groups[0][1]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(operands for operands, _ in groups))
    step = functools.partial(stores, implementation=implementation)
    mapped = jax.jit(jax.vmap(step, (0, None)))
    got = mapped(stacked, arrays)
    for i, (operands, _) in enumerate(groups):
        want = step(operands, arrays).pool
        assert np.mean(got.pool[i] != want) <= (0 if implementation == "ffi" else 0.05)
    if implementation == "ffi":
        text = mapped.lower(stacked, arrays).as_text()
        assert text.count(f"custom_call @{STORE.target}") == 1


@pytest.mark.parametrize("layer", (0, 2, jnp.int32(1), -1, 3, jnp.int32(7)), ids=str)
@pytest.mark.parametrize("implementation", ("ffi", "xla"))
def test_a_layer_is_written_alone(layer, implementation):
    (values, slots, positions, cache), arrays = case(KINDS[3])
    layers = dataclasses.replace(cache, pool=jnp.stack([cache.pool] * 3))
    step = functools.partial(stores, implementation=implementation)
    got = step((values, slots, positions, layers), arrays, layer=layer).pool
    alone = step((values, slots, positions, cache), arrays).pool
    for i in range(3):
        np.testing.assert_array_equal(got[i], alone if i == int(layer) else cache.pool)
    read = dequantize_records(dataclasses.replace(layers, pool=got), slots, layer=layer)
    want = dequantize_records(dataclasses.replace(cache, pool=alone), slots)
    exists = 0 <= int(layer) < 3
    np.testing.assert_array_equal(np.nan_to_num(read), np.nan_to_num(want) if exists else 0)


@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit), ids=str)
def test_on_a_mesh_the_groups_are_split(axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,), devices=jax.devices("cpu")[:8])
    groups = [case(KINDS[3], seed=seed) for seed in range(8)]
    arrays = groups[0][1]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(operands for operands, _ in groups))
    split = jax.device_put(stacked, NamedSharding(mesh, P("x")))
    program = jax.jit(jax.vmap(stores, (0, None)))
    shared = jax.device_put(arrays, NamedSharding(mesh, P()))
    assert not COLLECTIVE.findall(program.lower(split, shared).compile().as_text())
    want = jax.vmap(stores, (0, None))(stacked, arrays)
    np.testing.assert_array_equal(program(split, shared).pool, want.pool)


@pytest.mark.parametrize("implementation", ("ffi", "xla"))
def test_a_layer_of_any_number_of_them_can_be_exported(implementation):
    records = init_records(4, 3, head_dim=128, format="mxfp4", layers=2)
    (layers,) = jax.export.symbolic_shape("layers")
    pool = jax.ShapeDtypeStruct((layers, *records.pool.shape[1:]), jnp.uint8)
    read = functools.partial(dequantize_records, layer=1, implementation=implementation)
    exported = jax.export.export(jax.jit(read), disabled_checks=EXPORT_DISABLED_CHECKS)(
        dataclasses.replace(records, pool=pool), jax.ShapeDtypeStruct((2,), jnp.int32)
    )
    slots = np.array([0, 5], np.int32)
    pool = np.random.default_rng(0).integers(0, 100, records.pool.shape, np.uint8)
    for given in (pool, pool[:1]):  # a layer that does not exist gives zeros
        cache = dataclasses.replace(records, pool=given)
        np.testing.assert_array_equal(exported.call(cache, slots), read(cache, slots))


@with_or_without_cuda
def test_it_can_be_exported():
    operands, arrays = case(KINDS[5])
    exported = jax.export.export(
        jax.jit(stores), platforms=("cpu", "cuda"), disabled_checks=EXPORT_DISABLED_CHECKS
    )(operands, arrays)
    loaded = jax.export.deserialize(exported.serialize())
    got = loaded.call(operands, arrays)
    np.testing.assert_array_equal(got.pool, stores(operands, arrays).pool)


# ----------------------------------------------------------------------------------- reading back


def full_of_anything(kind, seed=0, num_pages=4, page_size=5):
    """A cache of random bytes, but for products that are denormal, which jnp may take for 0."""
    (_, _, _, cache), _ = case(kind, page_size, extra=4, num_pages=num_pages)
    rng = np.random.default_rng(seed)
    pool = rng.integers(0, 256, cache.pool.shape, np.uint8)
    scales = pool[:, page_size * cache._kind.data_bytes : cache._kind.page_bytes(page_size)]
    if kind[0] == "fp8_block128" and kind[2].get("scales") != "ue8m0":
        size = scales.shape[1] // 4
        scales.view(np.uint8)[:] = (
            np.ldexp(rng.random((num_pages, size)) + 1, rng.integers(-100, 120, (num_pages, size)))
            .astype(np.float32)
            .view(np.uint8)
        )
    elif kind[0] != "mxfp4":
        scales[:] = rng.integers(20, 255, scales.shape, np.uint8)
    return dataclasses.replace(cache, pool=pool)


@pytest.mark.parametrize("kind", (*KINDS, ("fp8", 512, {}), ("bf16", 128, {})), ids=name_of)
def test_any_bytes_are_read_as_the_reference_reads_them(kind, device):
    cache = full_of_anything(kind)
    slots = np.array([*range(-3, 23), 2**31 - 1, -(2**31)], np.int32)
    got, want = (
        np.asarray(dequantize_records(*jax.device_put((cache, slots), device), implementation=i))
        for i in ("ffi", "xla")
    )
    np.testing.assert_array_equal(got, want)
    exists = (slots >= 0) & (slots < 20)
    assert np.all(got[~exists] == 0) and np.all(np.any(got[exists] != 0, axis=1))


@pytest.mark.parametrize("mapped", ((None, 0), (0, None), (0, 0)), ids=str)
@pytest.mark.parametrize("implementation", ("ffi", "xla"))
def test_reading_under_vmap_is_a_loop_and_one_call(mapped, implementation):
    caches = [full_of_anything(KINDS[3], seed) for seed in range(3)]
    slots = np.random.default_rng(0).integers(-2, 22, (3, 7)).astype(np.int32)
    cache = caches[0] if mapped[0] is None else jax.tree.map(lambda *x: np.stack(x), *caches)
    read = functools.partial(dequantize_records, implementation=implementation)
    program = jax.jit(jax.vmap(read, mapped))
    got = program(cache, slots if mapped[1] == 0 else slots[0])
    for i in range(3):
        own = caches[0 if mapped[0] is None else i], slots[0 if mapped[1] is None else i]
        np.testing.assert_array_equal(got[i], read(*own))
    if implementation == "ffi":
        text = program.lower(cache, slots if mapped[1] == 0 else slots[0]).as_text()
        assert text.count(f"custom_call @{DEQUANTIZE.target}") == 1


@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit), ids=str)
def test_reading_on_a_mesh_is_split(axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,), devices=jax.devices("cpu")[:8])
    caches = [full_of_anything(KINDS[3], seed) for seed in range(8)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *caches)
    slots = np.random.default_rng(0).integers(-2, 22, (8, 7)).astype(np.int32)
    split = jax.device_put((stacked, slots), NamedSharding(mesh, P("x")))
    program = jax.jit(jax.vmap(dequantize_records))
    assert not COLLECTIVE.findall(program.lower(*split).compile().as_text())
    want = [dequantize_records(cache, own) for cache, own in zip(caches, slots, strict=True)]
    np.testing.assert_array_equal(program(*split), want)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"slots": np.zeros((2, 2), np.int32)}, ValueError),
        ({"slots": np.zeros(2, np.uint8)}, TypeError),
        ({"layer": 0}, ValueError),
        ({"implementation": "cuda"}, ValueError),
        ({"records": np.zeros((4, 4), np.uint8)}, TypeError),
    ],
    ids=str,
)
def test_a_wrong_argument_of_a_reader_is_named(changed, error):
    arguments = {"records": full_of_anything(KINDS[0]), "slots": np.zeros(2, np.int32)} | changed
    with pytest.raises(error, match=f"^{next(iter(changed))}"):
        dequantize_records(**arguments)


def test_a_derivative_raises():
    (values, slots, positions, cache), arrays = case(KINDS[0])

    def loss(values):
        return dequantize_records(stores((values, slots, positions, cache), arrays), slots).sum()

    with pytest.raises(NotImplementedError, match="store_records has no derivative"):
        jax.grad(loss)(values)


WRONG = {
    "values": (np.zeros((23, 64), np.float32), ValueError),
    "slots": (np.zeros(23, np.int64), TypeError),
    "positions": (np.zeros(22, np.int32), ValueError),
    "norm_weight": (np.zeros(128, np.float16), TypeError),
    "cos_sin_cache": (np.zeros((9, 32), np.float32), ValueError),
    "rms_norm_eps": (-1.0, ValueError),
    "rope_layout": ("neox", ValueError),
    "hadamard": (1, TypeError),
    "rounding": ("twice", ValueError),
    "layer": (0, ValueError),
    "implementation": ("cuda", ValueError),
    "records": (np.zeros((4, 4), np.uint8), TypeError),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    (values, slots, positions, cache), arrays = case(KINDS[5])
    arguments = {"values": values, "slots": slots, "positions": positions, "records": cache}
    value, error = WRONG[name]
    with pytest.raises(error, match=f"^{name}"):
        store_records(**arguments | arrays | {name: value})


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"format": "fp16"}, "format: "),
        ({"format": "fp8_ds_mla"}, "head_dim: expected 512"),
        ({"format": "fp8_block128", "head_dim": 192}, "head_dim: expected a multiple of 128"),
        ({"head_dim": 72}, "head_dim: expected a multiple of 32"),
        ({"page_bytes": 511}, "page_bytes: expected at least 512"),
        ({"page_bytes": 514}, "page_bytes: expected a multiple of 4"),
        ({"scales": "ue8m0"}, "scales: "),
        ({"scale_floor": True}, "scale_floor: "),
        ({"page_size": 0}, "page_size: "),
        ({"page_size": True}, "page_size: "),
        ({"page_size": 2**24}, "page_size: expected records of at most"),
        ({"page_bytes": 2**31}, "page_bytes: "),
        ({"num_pages": -1}, "num_pages: "),
    ],
    ids=str,
)
def test_a_wrong_cache_is_named(changed, text):
    arguments = {"num_pages": 2, "page_size": 4, "head_dim": 128, "format": "fp8"} | changed
    with pytest.raises((ValueError, TypeError), match=f"^{text}"):
        init_records(**arguments)


@pytest.mark.parametrize("implementation", ("ffi", "xla"))
def test_a_page_of_more_bytes_than_i32_counts_is_refused(implementation):
    records = init_records(1, 4, head_dim=128, format="f32")
    huge = dataclasses.replace(records, pool=jax.ShapeDtypeStruct((1, 2**31), jnp.uint8))
    read = functools.partial(dequantize_records, implementation=implementation)
    with pytest.raises(ValueError, match=r"^records.pool: expected pages .* at most 2147483644"):
        jax.eval_shape(read, huge, np.zeros(1, np.int32))


@pytest.mark.parametrize("implementation", ("ffi", "xla"))
def test_a_scale_that_is_never_written_is_read_as_zero(implementation):
    records = init_records(1, 1, head_dim=512, format="fp8_ds_mla")
    page = np.full(records.pool.shape, 0x7E, np.uint8)
    page[0, 576:584] = [0, 1, 127, 254, 0, 0, 0, 0]
    records = dataclasses.replace(records, pool=page)
    values = dequantize_records(records, np.zeros(1, np.int32), implementation=implementation)
    np.testing.assert_array_equal(values[0, :192:64], [0, 448 * 2.0**-126, 448])


def test_caches_of_different_kinds_have_different_leaves():
    leaves = [
        jax.tree_util.keystr(path)
        for format, head_dim, options in KINDS
        for path, _ in jax.tree_util.tree_leaves_with_path(
            init_records(1, 4, head_dim=head_dim, format=format, **options)
        )
    ]
    assert len(set(leaves)) == len(KINDS) - 1  # the floor of a scale changes no reader


def test_strict_promotion_and_the_reference():
    records = init_records(4, 3, head_dim=128, format="fp8_block128")
    z = np.zeros(2, np.int32)
    with jax.numpy_dtype_promotion("strict"):
        store_records(np.ones((2, 128), np.float32), z, z, records, implementation="xla")


def test_integers_of_numpy_as_page_size():
    records = init_records(4, 3, head_dim=128, format="fp8")
    z = np.zeros(3, np.int32)
    try:
        jax.block_until_ready(
            dequantize_records(dataclasses.replace(records, page_size=np.int32(3)), z)
        )
    finally:
        jax.block_until_ready(dequantize_records(records, z))
