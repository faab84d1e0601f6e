"""Ragged batches of short windows on a GPU, by walkers of so many slots (ffi/ragged_launch.cuh)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compressor import KINDS, check_alike, make_cache, make_compressor
from test_ragged_records import RULES, by_parts

from jax_dsv4 import CompressorCache, init_records, ragged_records
from jax_dsv4._op import Kernel

pytestmark = pytest.mark.gpu
# The last windows of the first request have no rotation, so that they are not stored.
LENS = np.array([411, 140, 0, 256, 90], np.int32)
CU = np.cumsum([1, 401, 131, 0, 70, 3], dtype=np.int32)
ROWS = CU[-1] + 9
SLOTS = (1, 3, 4, 6, 64)  # of records, four windows are one turn of a walker of head_dim 512


@pytest.mark.parametrize("state_format", ("raw", "prefix"))
@pytest.mark.parametrize(
    ("name", "format", "options"),
    [
        ("main", "fp8_ds_mla", {}),
        ("main", "fp8", {"rounding": "model", "rope_layout": "interleaved"}),
        ("main", "bf16", {"hadamard": True}),
        ("main", "f32", {"cos_sin_cache": None}),
        ("indexer", "fp8_block128", {}),
        ("indexer", "mxfp4", {"norm_weight": None}),
        ("next", "fp8_ds_mla", {}),
    ],
)
def test_records_are_those_of_values(name, format, options, state_format, gpu):
    head_dim, *_ = KINDS[name]
    rows = np.random.default_rng(0).standard_normal((ROWS, 4096), np.float32)
    rows[[0, *range(CU[-1], ROWS)]] = np.nan
    with jax.default_device(gpu):
        compressor = dataclasses.replace(make_compressor(name), **options)
        cache, tables = make_cache(name, state_format)
        sizes = cache.records.pool.shape[0], cache.records.page_size
        # Of scales in f32 a value's last bits show.
        scales = "power_of_two" if format == "fp8_block128" else "f32"
        records = init_records(*sizes, head_dim=head_dim, format=format, scales=scales)
        pool = jnp.full_like(records.pool, 0xA5)
        cache = CompressorCache(cache.state, dataclasses.replace(records, pool=pool))
        rows = jnp.asarray(rows[:, : 2 * compressor.state_dim], jnp.bfloat16)
        operands = rows, compressor, cache, tables, LENS, CU
        for rule in RULES:
            want, count = by_parts(*operands, rule, "ffi")
            assert count > 100
            for slots in SLOTS:
                kernel = Kernel(geometry=slots)
                call = functools.partial(ragged_records, store_rows=rule, implementation=kernel)
                got = jax.jit(call)(*operands)
                check_alike(*(as_stored(x, format) for x in (got, want)))


def as_stored(cache, format):
    """In f32 the order of a sum shows in many elements, in few of other formats."""
    pool = cache.records.pool
    if format == "f32":
        pool = jax.lax.bitcast_convert_type(pool.reshape(*pool.shape[:-1], -1, 4), jnp.float32)
    return cache.state, pool
