"""Records: the bytes that other projects' own code makes of the same values."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_dsv4 import RecordCache, dequantize_records, init_records, store_records
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


def stored(values, slots, positions, cache, **options):
    call = jax.jit(lambda *operands: store_records(*operands, **options))
    return np.asarray(call(values, np.asarray(slots, np.int32), positions, cache).pool)


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


def check_quantizer(values, pool, format, head_dim, page_size, slots=None, **options):
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


@pytest.mark.parametrize("name", ("e4m3", "e2m1"))
def test_conversions_are_those_of_ml_dtypes(name):
    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e2m1": ml_dtypes.float4_e2m1fn}[name]
    to_codes = {"e4m3": reference.to_e4m3, "e2m1": reference.to_e2m1}[name]
    from_codes = {"e4m3": reference.from_e4m3, "e2m1": reference.from_e2m1}[name]
    largest = float(ml_dtypes.finfo(dtype).max)
    every_bf16 = of_bf16(np.arange(2**16, dtype=np.uint16))
    random = np.random.default_rng(0).integers(0, 2**32, 10**7, np.uint64).astype(np.uint32)
    for values in (every_bf16, random.view(np.float32)):
        nan = np.isnan(values)
        want = np.clip(values, -largest, largest)
        want = np.where(nan, 0, want).astype(dtype).view(np.uint8)
        got = np.asarray(jax.jit(to_codes)(values))
        np.testing.assert_array_equal(got[~nan], want[~nan])
        assert np.all(got[nan] & 0x7F == (0x7F if name == "e4m3" else 7))
    codes = np.arange(256 if name == "e4m3" else 16, dtype=np.uint8)
    np.testing.assert_array_equal(
        np.asarray(from_codes(codes)), codes.view(dtype).astype(np.float32)
    )


# --------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize("head_dim", (128, 512))
def test_norm_and_rotation_are_those_of_transformers(head_dim):
    data = golden("records_f32_bf16")
    d = f"d{head_dim}_"
    values, positions = data[d + "values"], data[d + "positions"]
    slots = np.arange(len(values))
    norm = {"norm_weight": data[d + "weight"], "rms_norm_eps": 1e-6}
    for layout in ("halves", "interleaved"):
        turn = {"cos_sin_cache": data[f"table_{layout}"], "rope_layout": layout}
        cache = init_records(2, 5, head_dim=head_dim, format="f32")
        normed = dequantize_records(
            store_records(values, slots_of(slots), positions, cache, **norm), slots_of(slots)
        )
        np.testing.assert_allclose(normed, data[d + "normed_hf"], rtol=3e-7)
        rotated = dequantize_records(
            store_records(values, slots_of(slots), positions, cache, **norm, **turn),
            slots_of(slots),
        )
        want = data[d + "rotated_hf"]
        assert np.all(np.abs(rotated - want) <= 3e-7 * np.abs(want).max(1, keepdims=True))
        cache = init_records(2, 5, head_dim=head_dim, format="bf16")
        got = stored(values, slots, positions, cache, **norm, **turn)
        want = data[d + "rotated_hf_bf16"].reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(got.reshape(-1)[: want.size], want)


def slots_of(slots):
    return np.asarray(slots, np.int32)


def test_the_hadamard_transform_is_the_reference_one():
    data = golden("records_f32_bf16")
    values, want = data["d128_rotated_hf"], data["d128_hadamard_ref"]
    slots = np.arange(len(values), dtype=np.int32)
    cache = init_records(1, 8, head_dim=128, format="f32")
    got = dequantize_records(store_records(values, slots, slots, cache, hadamard=True), slots)
    assert np.all(np.abs(got - want) <= 1e-6 * np.abs(want).max(1, keepdims=True))


# ---------------------------------------------------------------------------------- the quantisers


def test_fp8_ds_mla_is_flashmlas_and_vllms():
    data = golden("records_fp8_ds_mla")
    values = of_bf16(data["values"])
    pool, page_size = data["pool_scale_floor_flashmla"], data["page_size"]
    check_quantizer(values, pool, "fp8_ds_mla", 512, page_size, scale_floor=True)
    check_quantizer(
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


def test_fp8_block128_is_deepgemms():
    data = golden("records_fp8_block128")
    values, pool = of_bf16(data["values"]), data["pool_deepgemm"]
    check_quantizer(values, pool, "fp8_block128", 128, data["page_size"])
    cache = RecordCache(jnp.asarray(pool), "fp8_block128", 128, int(data["page_size"]))
    got = dequantize_records(cache, np.arange(32, dtype=np.int32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), data["dequant_deepgemm"])
    slots = np.arange(16)
    cache = cache_of(data["pool_f32_deepgemm"], "fp8_block128", 128, 16)
    got = stored(data["values_f32"], slots, slots_of(slots), cache, rounding="none")
    np.testing.assert_array_equal(got, data["pool_f32_deepgemm"])


def test_fp8_block128_with_powers_of_two_is_tilekernels():
    data = golden("records_fp8_block128")
    values = of_bf16(data["values"])
    slots = np.arange(64)
    cache = init_records(1, 64, head_dim=128, format="fp8_block128", scales="power_of_two")
    got = stored(values, slots, slots_of(slots), cache)[0]
    codes, scales = got[: 64 * 128].reshape(64, 128), got[64 * 128 :].view(np.float32)
    np.testing.assert_array_equal(codes, data["codes_pow2_tilekernels"])
    np.testing.assert_array_equal(scales, data["scales_pow2_tilekernels"])


def test_mxfp4_is_tilekernels():
    data = golden("records_mxfp4")
    values = of_bf16(data["values"])
    slots = np.arange(64)
    cache = init_records(1, 64, head_dim=128, format="mxfp4")
    got = stored(values, slots, slots_of(slots), cache)[0]
    codes, scales = got[: 64 * 64].reshape(64, 64), got[64 * 64 :].reshape(64, 4)
    np.testing.assert_array_equal(codes, data["codes_tilekernels"])
    np.testing.assert_array_equal(scales, data["scales_tilekernels"])
    cache = dataclasses.replace(cache, pool=jnp.asarray(got[None]))
    np.testing.assert_array_equal(
        dequantize_records(cache, slots_of(slots[:32])), data["dequant_tilekernels"]
    )


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
def test_whole_chains(chain):
    format, name, options = CHAINS[chain]
    data, tables = golden(f"records_{format}"), golden("records_f32_bf16")
    values, slots = data["chain_values"], data["chain_slots"]
    for layout in ("halves", "interleaved"):
        cache = cache_of(data[name], format, values.shape[1], data["chain_page_size"], **options)
        got = stored(
            values,
            slots,
            data["chain_positions"].astype(np.int32),
            cache,
            norm_weight=data["chain_weight"],
            cos_sin_cache=tables[f"table_{layout}"],
            rope_layout=layout,
        )
        np.testing.assert_array_equal(got, data[name])


@pytest.mark.parametrize("format", ("fp8_ds_mla", "mxfp4"))
def test_deepseeks_own_rounding(format):
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
    positions = data["every_step_positions"].astype(np.int32)
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


def test_without_rounding_it_is_tensorrts():
    data, tables = golden("records_mxfp4"), golden("records_f32_bf16")
    values = of_bf16(data["f32_chain_values"])
    count = len(values)
    cache = init_records(1, count, head_dim=128, format="mxfp4")
    got = stored(
        values,
        np.arange(count),
        data["f32_chain_positions"].astype(np.int32),
        cache,
        norm_weight=data["every_step_weight"],
        cos_sin_cache=tables["table_halves"],
        hadamard=True,
    )[0]
    codes, scales = got[: 64 * count].reshape(count, 64), got[64 * count :].reshape(count, 4)
    np.testing.assert_array_equal(codes, data["f32_chain_codes_tensorrt"])
    np.testing.assert_array_equal(scales, data["f32_chain_scales_tensorrt"])


def test_sglangs_indexer():
    data, tables = golden("records_fp8_block128"), golden("records_f32_bf16")
    want, page_size = data["sglang_pool"], int(data["sglang_page_size"])
    cache = cache_of(want, "fp8_block128", 128, page_size)
    got = stored(
        data["sglang_values"],
        data["sglang_slots"],
        data["sglang_positions"].astype(np.int32),
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
