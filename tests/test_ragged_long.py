"""Ragged batches of long windows on a GPU, by each of their kernels (ffi/ragged_launch.cuh)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ragged_batches
from cases import BF16_IN_F32_STATE as DTYPES
from checks import check_close, check_same_bits
from ragged_batches import REGIMES, SIZES, Sizes, check, expected, make_batch, run, store_rules
from test_compressor import check_alike, make_compressor
from test_ragged_records import by_parts

from jax_dsv4 import CacheTables, CompressorCache, init_records, init_state, live, ragged_records
from jax_dsv4._op import Kernel

pytestmark = pytest.mark.gpu
LONG = next(x for x in SIZES if (x.kind.compress_ratio, x.kind.head_dim) == (128, 512))
# Sixteen rows, which are looked up at once, are on one page, or they are not.
PAGES = (LONG, LONG._replace(page_size=48, max_pages=19))
# Of the last one, a row group stores rows of two blocks with others between them.
RULES = (*store_rules(LONG.kind), live(max_rewind=0, resume_every=40))
SLICES, TWO, FOUR = (Kernel(geometry=geometry) for geometry in (0, 2, 4))
in_formats = pytest.mark.parametrize("state_format", ("raw", "prefix"))


@pytest.mark.parametrize("rule", RULES, ids=str)
@in_formats
def test_each_kernel_agrees_with_float64(state_format, rule, gpu):
    for seed, regime in enumerate(REGIMES):
        sizes = PAGES[seed % 2]
        batch = make_batch(sizes, DTYPES, regime, seed)
        want = expected(batch, sizes.kind, state_format, rule)
        for kernel in (SLICES, TWO):
            with jax.default_device(gpu):
                got = run(batch, sizes.kind, DTYPES, state_format, rule, kernel)
            check(got, want, batch, state_format)


@pytest.mark.parametrize("kernel", (SLICES, TWO, FOUR), ids=("slices", "two", "four"))
@pytest.mark.parametrize("format", ("bf16", "fp8_ds_mla"))
@in_formats
def test_records_of_each_kernel_are_those_of_values(state_format, format, kernel, gpu):
    """With pages of records that do not exist, and a position past the table of rotations."""
    lens, cu = np.array([700, 150, 130], np.int32), np.array([0, 600, 750, 753], np.int32)
    rows = np.random.default_rng(0).standard_normal((760, 1024), np.float32)
    rows[cu[-1] :] = np.nan
    with jax.default_device(gpu):
        compressor = make_compressor("hca")
        assert 384 < len(compressor.cos_sin_cache) < 512  # the last windows of 700 rows
        records = init_records(6, 2, head_dim=512, format=format)
        records = dataclasses.replace(records, pool=jnp.full(records.pool.shape, 0xA5, jnp.uint8))
        state = init_state(3 * 44, 16, head_dim=512, compress_ratio=128, format=state_format)
        cache = CompressorCache(state, records)
        tables = CacheTables(
            np.arange(3 * 44, dtype=np.int32).reshape(3, 44),
            np.array([[3, 5, 0], [2**31 - 1, 1, 2], [4, -1, -1]], np.int32),
        )
        operands = jnp.asarray(rows, jnp.bfloat16), compressor, cache, tables, lens, cu
        for rule in RULES:
            call = functools.partial(ragged_records, store_rows=rule, implementation=kernel)
            got = jax.jit(call)(*operands)
            want, _ = by_parts(*operands, rule, "ffi")
            check_alike(got, want)
            stored = np.any(np.asarray(got.records.pool) != 0xA5, axis=-1)
            np.testing.assert_array_equal(stored, [False, False, False, True, True, True])


@in_formats
def test_many_windows_are_those_of_few(state_format, gpu):
    """As many as there are places for on SMs: by default two row groups share each."""
    sizes = Sizes(LONG.kind, 2 * 128 * gpu.core_count, 2, 64, 4 * gpu.core_count + 8)
    batch = make_batch(sizes, DTYPES, "resumed")
    with jax.default_device(gpu):
        slices, *others = (
            run(batch, LONG.kind, DTYPES, state_format, live(max_rewind=3), implementation)
            for implementation in (SLICES, TWO, None)
        )
    ragged_batches._pools.cache_clear()  # large ones
    for other in others:
        check_close(other.kv_comp, slices.kv_comp)
        for name in ("kv", "score"):
            got, want = getattr(other, name), getattr(slices, name)
            if state_format == "raw":
                check_same_bits(got, want)
            else:
                check_close(got, want)
