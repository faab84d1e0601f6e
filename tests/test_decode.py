"""Numbers: float64 NumPy -> the jnp reference -> the compiled kernel."""

import dataclasses

import cases
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import INT32_MAX, INT32_MIN, Case
from checks import (
    Results,
    arguments,
    bits,
    check_close,
    check_results,
    check_same_bits,
    check_unwritten,
    expected_results,
    run,
    step_of,
)

IMPLEMENTATIONS = ("ffi", "xla")


def check_all(case, operands, device):
    # In this order, so that memory the kernel gets never held the right answer.
    kernel = run(case, operands, "ffi", device)
    reference = run(case, operands, "xla", device)
    expected = expected_results(case, operands)
    for got in (reference, kernel):
        check_results(got, expected, case.state_format)
        check_unwritten(got, expected, operands)
    check_results(kernel, reference, case.state_format)
    return expected


@pytest.mark.parametrize("case", cases.in_formats(cases.ALL), ids=str)
def test_reference_agrees_with_float64_and_the_kernel_with_both(case, device):
    expected = check_all(case, cases.make_operands(case), device)
    assert np.any(expected.kv_comp), "the case completes no window"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "geometry"), [*cases.GEOMETRIES, *cases.PREFIX_GEOMETRIES], ids=str
)
def test_every_geometry_agrees_with_float64(case, geometry, gpu):
    operands = cases.make_operands(case)
    kernel = run(case, operands, "ffi", gpu, geometry)
    check_results(kernel, expected_results(case, operands), case.state_format)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "geometry"),
    [
        (case, geometry)
        for case, geometry in (*cases.GEOMETRIES, *cases.PREFIX_GEOMETRIES)
        if case.dtypes == cases.BF16_IN_F32_STATE
    ],
    ids=str,
)
def test_every_geometry_of_calls_that_are_not_plain(case, geometry, gpu):
    """kv_score as a pair, and the layer on the device, have kernels of their own."""
    operands = cases.make_operands(case)
    expected = expected_results(case, operands)
    kv_score, ape, kv, score, *rest = arguments(operands, gpu)
    step = step_of(case, "ffi", geometry)
    pair = tuple(jnp.split(kv_score, 2, axis=-1))
    got = jax.jit(step)(pair, ape, kv, score, *rest)
    check_results(Results(*map(np.asarray, got)), expected, case.state_format)
    layers = (jnp.stack([x, jnp.zeros_like(x)]) for x in (kv, score))
    got = jax.jit(step)(kv_score, ape, *layers, *rest, jnp.int32(0))
    got = Results(np.asarray(got.kv[0]), np.asarray(got.score[0]), np.asarray(got.kv_comp))
    check_results(got, expected, case.state_format)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case", cases.in_formats([c for c in cases.ALL if c.regime == "non_finite"]), ids=str
)
def test_non_finite_inputs_stay_in_their_channels(case, implementation, device):
    kv_comp = run(case, cases.make_operands(case), implementation, device).kv_comp
    hit = np.flatnonzero(~np.isfinite(kv_comp).all(axis=(0, 1)))
    assert set(hit) == {column % case.head_dim for column in cases.NON_FINITE_COLUMNS.values()}


@pytest.mark.parametrize(
    "empty",
    [
        {"kv_score": 0, "kv_tables": 0, "score_tables": 0, "kv_lens": 0},
        {"kv_tables": 1, "score_tables": 1},
        {"kv": 0, "score": 0},
    ],
    ids=["no requests", "no pages in the tables", "no pages in the pool"],
)
@pytest.mark.parametrize("case", cases.in_formats(cases.MTP[:1]), ids=str)
def test_empty_dimensions_are_served(case, empty, device):
    operands = cases.make_operands(case)
    for name, axis in empty.items():
        array = getattr(operands, name)
        setattr(operands, name, np.take(array, [], axis=axis).astype(array.dtype))
    check_all(case, operands, device)


@pytest.mark.parametrize(
    "case",
    cases.in_formats(
        [
            Case(24, 4, 3, cases.BF16_IN_F32_STATE),
            Case(24, 4, 3, cases.BF16_IN_F32_STATE, overlap=False),
            Case(24, 128, 3, cases.BF16_IN_F32_STATE, overlap=True),
        ]
    ),
    ids=str,
)
def test_reference_serves_any_head_dim_and_both_overlaps(case, device):
    operands = cases.make_operands(case)
    got, expected = run(case, operands, "xla", device), expected_results(case, operands)
    check_results(got, expected, case.state_format)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases.in_formats(cases.REWIND), ids=str)
def test_rejected_drafts_leave_no_trace(case, implementation, device):
    """Three runs over the same tokens: with drafts, some rejected at random and overwritten in the
    next step; with the same steps, but only the accepted tokens; and one token at a time.

    A row has the same bits in the first two; in the third, too, but for some prefixes that are only
    close: on a GPU, where a step's new rows may be merged before they meet those before the step,
    and of the reference, where XLA's rounding depends on the program, here on next_n.
    """
    rng = np.random.default_rng(0)
    start = cases.make_operands(case)
    capacity = case.max_pages * case.page_size
    tokens = cases.make_operands(dataclasses.replace(case, next_n=capacity)).kv_score
    requests = np.arange(case.batch)
    drafting = accepting = single = start

    def step(operands, kv_score, kv_lens, q_lens):
        lens = {"kv_lens": kv_lens.astype(np.int32), "q_lens": q_lens.astype(np.int32)}
        operands = dataclasses.replace(operands, kv_score=kv_score, **lens)
        step_case = dataclasses.replace(case, next_n=kv_score.shape[1])
        kv, score, kv_comp = run(step_case, operands, implementation, device)
        return dataclasses.replace(operands, kv=kv, score=score), kv_comp

    lengths = np.zeros(case.batch, int)
    values = [{} for _ in requests]
    num_retracted = 0
    while lengths.max() + case.next_n <= capacity:
        num_accepted = rng.integers(1, case.next_n + 1, case.batch)
        positions = lengths[:, None] + np.arange(case.next_n)
        rejected = np.arange(case.next_n) >= num_accepted[:, None]
        drafts = tokens[requests[:, None], positions]
        drafts[rejected] = tokens[rng.integers(case.batch), rng.integers(capacity)]

        everything = np.full(case.batch, case.next_n)
        drafting, with_drafts = step(drafting, drafts, lengths + everything, everything)
        accepting, without = step(accepting, drafts, lengths + num_accepted, num_accepted)
        for b in requests:
            first, end = lengths[b] // case.ratio, (lengths[b] + num_accepted[b]) // case.ratio
            num_retracted += (lengths[b] + case.next_n) // case.ratio - end
            check_same_bits(with_drafts[b, : end - first], without[b, : end - first])
            values[b] |= dict(zip(range(first, end), with_drafts[b], strict=False))
        lengths += num_accepted
    assert num_retracted > 0, "no window was completed by a rejected draft"

    for position in range(lengths.max()):
        q_lens = (position < lengths).astype(int)
        kv_lens = np.full(case.batch, position + 1)
        single, kv_comp = step(single, tokens[:, position : position + 1], kv_lens, q_lens)
        for b in requests[q_lens > 0]:
            if (position + 1) % case.ratio == 0:
                check_close(values[b].pop(position // case.ratio), kv_comp[b, 0])
    assert not any(values), "more windows than the tokens complete"

    for b in requests:
        pages, slots = np.divmod(np.arange(lengths[b]), case.page_size)

        def live_rows(operands, b=b, pages=pages, slots=slots):
            kv = operands.kv[operands.kv_tables[b, pages], slots]
            return Results(kv, operands.score[operands.score_tables[b, pages], slots], kv[:0])

        for never_rewound in (accepting, single):
            got, want = live_rows(drafting), live_rows(never_rewound)
            one_order = implementation == "ffi" and device.platform == "cpu"
            exact = never_rewound is accepting or one_order
            check_results(got, want, "raw" if exact else case.state_format)


def lengths_of(case):
    capacity = case.max_pages * case.page_size
    return st.one_of(
        st.sampled_from(case.lengths),
        st.integers(-1, capacity + 2 * case.ratio),
        st.integers(INT32_MIN, INT32_MAX),
    )


def drawn_operands(data, case, page_ids):
    """The case's operands with tables, lengths and q_lens drawn."""

    def draw(elements, *shape):
        count = int(np.prod(shape))
        drawn = data.draw(st.lists(elements, min_size=count, max_size=count))
        return np.array(drawn, np.int32).reshape(shape)

    operands = cases.make_operands(case, seed=data.draw(st.integers(0, 3)))
    operands.q_lens = draw(st.integers(-1, case.next_n + 1), case.batch)
    operands.kv_lens = draw(lengths_of(case), case.batch)
    for tables in (operands.kv_tables, operands.score_tables):
        ids = draw(page_ids, *tables.shape)
        np.copyto(tables, ids, where=ids != KEEP)
    return operands


KEEP = -7
BAD_IDS = st.sampled_from([-1, INT32_MIN, INT32_MAX, 1 << 20])
# The same examples every time, and no files.
RANDOM_SETTINGS = hypothesis.settings(
    max_examples=60, derandomize=True, deadline=None, database=None
)


@pytest.mark.parametrize("case", cases.in_formats(cases.RANDOM), ids=str)
@RANDOM_SETTINGS
@hypothesis.given(data=st.data())
def test_random_tables_and_lengths_agree_with_float64(case, device, data):
    check_all(case, drawn_operands(data, case, st.just(KEEP) | BAD_IDS), device)


@pytest.mark.parametrize("case", cases.in_formats(cases.RANDOM), ids=str)
@RANDOM_SETTINGS
@hypothesis.given(data=st.data())
def test_tables_in_conflict_change_no_other_rows(case, device, data):
    """Several requests write one row, so its value is open; which rows are written is not."""
    operands = drawn_operands(data, case, st.integers(-2, case.num_pages) | BAD_IDS)
    results = [run(case, operands, implementation, device) for implementation in IMPLEMENTATIONS]
    expected = expected_results(case, operands)
    for got in results:
        for name in ("kv", "score"):
            before, after = getattr(operands, name), getattr(got, name)
            written = np.any(getattr(expected, name) != before, axis=-1)
            np.testing.assert_array_equal(np.any(bits(after) != bits(before), axis=-1), written)
        assert np.isfinite(got.kv_comp).all()
