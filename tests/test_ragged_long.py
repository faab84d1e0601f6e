"""Ragged batches of long windows on a GPU, by each of their kernels."""

import jax
import pytest
from cases import BF16_IN_F32_STATE as DTYPES
from checks import check_close, check_same_bits
from ragged_batches import REGIMES, SIZES, Sizes, check, expected, make_batch, run, store_rules

from jax_dsv4 import live
from jax_dsv4._op import Kernel

pytestmark = pytest.mark.gpu
LONG = next(x for x in SIZES if (x.kind.compress_ratio, x.kind.head_dim) == (128, 512))
in_formats = pytest.mark.parametrize("state_format", ("raw", "prefix"))


# 0: CTAs of a slice of a window; 2: of two row groups (ffi/ragged_launch.cuh).
@pytest.mark.parametrize("geometry", (0, 2))
@pytest.mark.parametrize("rule", range(3), ids=("all", "live", "live, resume"))
@in_formats
def test_each_kernel_agrees_with_float64(state_format, rule, geometry, gpu):
    rule = store_rules(LONG.kind)[rule]
    for seed, regime in enumerate(REGIMES):
        batch = make_batch(LONG, DTYPES, regime, seed)
        want = expected(batch, LONG.kind, state_format, rule)
        with jax.default_device(gpu):
            got = run(batch, LONG.kind, DTYPES, state_format, rule, Kernel(geometry=geometry))
        check(got, want, batch, state_format)


@in_formats
def test_many_windows_are_those_of_few(state_format, gpu):
    """As many as there are places for on SMs, by default."""
    sizes = Sizes(LONG.kind, 2 * 128 * gpu.core_count, 2, 64, 4 * gpu.core_count + 8)
    batch = make_batch(sizes, DTYPES, "resumed")
    with jax.default_device(gpu):
        many, few = (
            run(batch, LONG.kind, DTYPES, state_format, live(max_rewind=3), implementation)
            for implementation in (None, Kernel(geometry=0))
        )
    check_close(many.kv_comp, few.kv_comp)
    for name in ("kv", "score"):
        got, want = getattr(many, name), getattr(few, name)
        if state_format == "raw":
            check_same_bits(got, want)
        else:
            check_close(got, want)
