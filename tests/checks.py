"""How a step is run and its results are compared."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, Operands

from jax_dsv4 import CompressorState, paged_kv_compress
from jax_dsv4._op import Kernel


class Results(NamedTuple):
    kv: np.ndarray
    score: np.ndarray
    kv_comp: np.ndarray


STATE = (2, 3)  # the operands that are the state
COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
# For a test of a program for CUDA that may be lowered by a build without it.
with_or_without_cuda = pytest.mark.filterwarnings("ignore:jax_dsv4 was built without:UserWarning")


@functools.cache
def step(
    compress_ratio: int,
    overlap: bool,
    out_dtype: str,
    implementation: str | Kernel | None,
    state_format: str,
) -> Callable[..., Results]:
    """``paged_kv_compress`` from ``Operands``, as a tuple, and a layer, to ``Results``."""

    def step(kv_score, ape, kv, score, kv_tables, score_tables, kv_lens, q_lens, layer=None):
        kv_comp, state = paged_kv_compress(
            kv_score,
            ape,
            CompressorState(kv, score, state_format),
            kv_tables if score_tables is None else (kv_tables, score_tables),
            kv_lens,
            q_lens=q_lens,
            compress_ratio=compress_ratio,
            overlap=overlap,
            layer=layer,
            out_dtype=out_dtype,
            implementation=implementation,
        )
        return Results(state.kv, state.score, kv_comp)

    return step


def step_of(
    case: Case, implementation: str | Kernel | None = None, geometry: int = -1
) -> Callable[..., Results]:
    if geometry >= 0:
        implementation = Kernel(geometry=geometry)
    return step(case.ratio, case.overlap, case.dtypes.out, implementation, case.state_format)


@functools.cache
def donating(
    step: Callable[..., Results], compiled_quickly: bool = False
) -> Callable[..., Results]:
    options = {"xla_backend_optimization_level": 0} if compiled_quickly else None
    return jax.jit(step, donate_argnums=STATE, compiler_options=options)


def arguments(operands: Operands, device: jax.Device) -> list[jax.Array | None]:
    """The operands of a ``step``. Copies: a donated array must not be a view of NumPy's memory."""
    kv_score, ape, kv, score, kv_tables, score_tables, *lens = operands.astuple()
    if score_tables is kv_tables:
        score_tables = None
    arrays = (kv_score, ape, kv, score, kv_tables, score_tables, *lens)
    return [None if x is None else jnp.array(x, device=device) for x in arrays]


def run(
    case: Case, operands: Operands, implementation: str, device: jax.Device, geometry: int = -1
) -> Results:
    """One jitted step with donated state. Most of a reference's time on a CPU is LLVM's."""
    compiled_quickly = implementation == "xla" and device.platform == "cpu"
    arrays = arguments(operands, device)
    poison((case.batch, case.num_windows, case.head_dim), case.dtypes.out, device)
    results = donating(step_of(case, implementation, geometry), compiled_quickly)(*arrays)
    return Results(*(np.asarray(array) for array in results))


def poison(shape: tuple[int, ...], dtype: str, device: jax.Device) -> None:
    """Leave NaN in the memory that the next result of this size is likely to get."""
    jax.block_until_ready(jnp.array(np.full(shape, np.nan, dtype), device=device)).delete()


def expected_results(case: Case, operands: Operands) -> Results:
    """In float64; a raw state rounded to its dtype."""
    step = {"raw": oracle.paged_kv_compress, "prefix": oracle.paged_kv_compress_on_prefixes}
    return Results(
        *step[case.state_format](*operands.astuple(), ratio=case.ratio, overlap=case.overlap)
    )


def bits(x: np.ndarray) -> np.ndarray:
    """As integers; a NaN is a NaN, for processors differ in the payload they give it."""
    x = np.where(np.isnan(x), np.array(np.nan, x.dtype), x)
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def check_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(bits(got), bits(want))


def check_close(
    kv_comp: np.ndarray, want: np.ndarray, floor=0.1, tolerance=1e-5, zeros=True
) -> None:
    """Within 1e-5 (floor 0.1) of ``want``, or for bf16 within one ulp of ``want`` rounded.

    Exact where ``want`` is 0, and not finite exactly where ``want`` is not.
    """
    got, want = kv_comp.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    got, want = got[finite], want[finite]
    np.testing.assert_array_equal(got[(want == 0) & zeros], 0)
    allowed = tolerance * np.maximum(np.abs(want), floor)
    if kv_comp.dtype != np.float32:
        want = want.astype(kv_comp.dtype)
        allowed = np.maximum(np.spacing(np.abs(want)).astype(np.float64), 1e-6)
    error = np.abs(got - want.astype(np.float64))
    worst = np.argmax(error / allowed) if error.size else None
    assert np.all(error <= allowed), (
        f"off by {error[worst]} where {allowed[worst]} is allowed: got {got[worst]}, "
        f"expected {want[worst]}; {np.sum(error > allowed)} of {error.size} values"
    )


def check_results(got: Results, want: Results, state_format: str = "raw") -> None:
    if state_format == "prefix":
        return check_prefixes(got, want)
    check_same_bits(got.kv, want.kv)
    check_same_bits(got.score, want.score)
    check_close(got.kv_comp, want.kv_comp)


def check_prefixes(got: Results, want: Results) -> None:
    """The scores within 2e-6 of 1 + |want|; kv and the values, of a scale of 1, within 1e-5.

    More where scores are large: f32 has 24 bits for a logsumexp, and weights are as exact as it is.
    """
    np.testing.assert_array_equal(got.score == -np.inf, want.score == -np.inf)
    check_close(1 + np.abs(got.score), 1 + np.abs(want.score), tolerance=2e-6)
    finite = np.abs(want.score[np.isfinite(want.score)])
    looser = {"floor": 1, "tolerance": 1e-5 * max(1, finite.max(initial=0) / 16)}
    check_close(got.kv, want.kv, **looser, zeros=False)
    check_close(got.kv_comp, want.kv_comp, **looser)


def check_unwritten(got: Results, want: Results, operands: Operands) -> None:
    """Rows that ``want`` does not change have their bits."""
    for name in ("kv", "score"):
        before, expected = getattr(operands, name), getattr(want, name)
        same = np.all(bits(expected.astype(before.dtype)) == bits(before), axis=-1)
        check_same_bits(getattr(got, name)[same], before[same])
