"""State format "prefix": how exact it is, what it has in common with "raw", and the way there."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_close, check_same_bits, run

from jax_dsv4 import CompressorState, init_state, paged_kv_compress, raw_to_prefix

IMPLEMENTATIONS = ("ffi", "xla")
SMALL_KINDS = cases.SMALL_KINDS
UNIT_ROUNDOFF = 2.0**-24


# --------------------------------------------------------------------------------------- exactness


def alternating(high, low):
    return lambda normal: np.where(np.arange(normal.shape[1])[:, None] % 2, high, low) + 0 * normal


def minus_inf_where(condition):
    def scores(normal):
        row = np.arange(normal.shape[1])[:, None]
        return np.where(condition(row), -np.inf, 2 * normal)

    return scores


# Scores of the rows of a window [B, R, S], from normally distributed ones.
SCORES = {
    "normal": lambda normal: 2 * normal,
    "equal": lambda normal: 0 * normal + 1.7,
    "ascending": lambda normal: np.sort(5 * normal, axis=1),
    "descending": lambda normal: -np.sort(5 * normal, axis=1),
    "88 apart": alternating(88, 0),
    "-88 apart": alternating(-88, 0),
    "-inf first": minus_inf_where(lambda row: row < 3),
    "-inf last": minus_inf_where(lambda row: row > 2),
    "-inf in between": minus_inf_where(lambda row: row % 2 == 1),
    "-inf only": minus_inf_where(lambda row: row >= 0),
    "-8": lambda normal: 2 * normal - 8,
    "100": lambda normal: 2 * normal + 100,
    "1e4": lambda normal: 2 * normal + 1e4,
    "-1e6": lambda normal: 2 * normal - 1e6,
    "1e30": lambda normal: 1e30 * normal,
}
KV = {
    "normal": lambda normal: normal,
    "far from 0": lambda normal: 1000 + normal,
    "constant": lambda normal: 0 * normal + 1.1,
    "heavy tails": lambda normal: normal**7,
}


def window_at_once(kind, implementation, kv, score, device, format="prefix"):
    """One step that brings a whole window to each request -> (states of its rows, values)."""
    batch, ratio, _ = kv.shape
    windows = {"compress_ratio": ratio, "overlap": kind.overlap}
    state = init_state(batch, ratio, head_dim=kind.head_dim, **windows, format=format)
    state, kv_score, tables, lens = jax.device_put(
        (
            state,
            np.concatenate([kv, score], axis=-1),
            np.arange(batch, dtype=np.int32)[:, None],
            np.full(batch, ratio, np.int32),
        ),
        device,
    )
    step = functools.partial(
        paged_kv_compress,
        **windows,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    kv_comp, state = jax.jit(step)(kv_score, None, state, tables, lens)
    return jax.tree.map(np.asarray, (state, kv_comp[:, 0]))


def prefixes_in_float64(scores, kv):
    """(logsumexp, mean) of the first rows of a window [B, R, S], at each row."""
    lse, mean = np.empty_like(scores), np.empty_like(scores)
    for row in range(scores.shape[1]):
        rows = slice(row + 1)
        highest = scores[:, rows].max(1, keepdims=True)
        shift = np.where(highest == -np.inf, 0, highest)
        weights = np.exp(scores[:, rows] - shift)
        total = weights.sum(1)
        some = total > 0
        lse[:, row] = np.where(some, shift[:, 0] + np.log(np.where(some, total, 1)), -np.inf)
        mean[:, row] = (weights * kv[:, rows]).sum(1) / np.where(some, total, 1)
    return lse, mean


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", SMALL_KINDS, ids=str)
def test_prefixes_are_within_the_documented_bound_of_float64(kind, implementation, device):
    """At each row, relative to the window's largest |kv|; within 2e-6 for scores of common size."""
    ratio, state_dim = kind.compress_ratio, kind.state_dim
    normals = np.random.default_rng(0).standard_normal((2, 2, ratio, state_dim))
    names = [(scores, kv) for scores in SCORES for kv in KV]
    score = np.stack([SCORES[scores](normals[0]) for scores, _ in names]).astype(np.float32)
    kv = np.stack([KV[kv](normals[1]) for _, kv in names]).astype(np.float32)
    score, kv = (x.reshape(-1, ratio, state_dim) for x in (score, kv))
    state, values = window_at_once(kind, implementation, kv, score, device)

    score, kv = score.astype(np.float64), kv.astype(np.float64)
    lse, mean = prefixes_in_float64(score, kv)
    some = lse > -np.inf
    np.testing.assert_array_equal(state.score > -np.inf, some)
    largest_lse = np.max(np.abs(lse), axis=1, keepdims=True, initial=0, where=some)
    lse_error = np.abs(np.where(some, state.score, 0) - np.where(some, lse, 0))
    assert np.all(lse_error <= ratio * UNIT_ROUNDOFF * (4 + largest_lse))
    error = np.abs(state.kv - mean) / np.max(np.abs(kv), axis=1, keepdims=True)
    assert np.all(error <= ratio * UNIT_ROUNDOFF * (12 + largest_lse))
    common = np.broadcast_to(largest_lse <= 16, error.shape)
    assert error[common].max() <= 2e-6
    own = state.kv[:, -1, -kind.head_dim :]  # of the first window: there is none before it
    check_same_bits(values, own)


NOT_FINITE = {  # rows of kv and of scores that are, by column
    "inf": ({1: np.inf}, {}),
    "-inf first": ({0: -np.inf}, {}),
    "inf twice": ({0: np.inf, 2: np.inf}, {}),
    "inf and -inf": ({1: np.inf, 2: -np.inf}, {}),
    "NaN": ({2: np.nan}, {}),
    "inf without weight": ({2: np.inf}, {2: -np.inf}),
    "inf without weight first": ({0: np.inf}, {0: -np.inf}),
    "inf of too little weight": ({2: np.inf}, {2: -200}),
    "inf soon of too little weight": ({1: np.inf}, {3: 200}),
    "a score of inf": ({}, {1: np.inf}),
    "a score of NaN": ({}, {0: np.nan}),
    "no weight at all, inf": ({1: np.inf}, dict.fromkeys(range(128), -np.inf)),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", SMALL_KINDS, ids=str)
def test_values_that_are_not_finite_are_those_of_raw(kind, implementation, device):
    ratio, state_dim = kind.compress_ratio, kind.state_dim
    kv, score = np.random.default_rng(0).standard_normal((2, 1, ratio, state_dim), np.float32)
    for column, (kv_rows, score_rows) in enumerate(NOT_FINITE.values()):
        column -= kind.head_dim  # of the half that the window itself uses
        for row, value in kv_rows.items():
            kv[:, min(row, ratio - 1), column] = value
        for row, value in score_rows.items():
            score[:, min(row, ratio - 1), column] = value
    (_, got), (_, want) = (
        window_at_once(kind, implementation, kv, score, device, format)
        for format in ("prefix", "raw")
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert 0 < np.sum(np.isinf(want)) < np.sum(np.isnan(want)) < len(NOT_FINITE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_differences_of_large_kv_do_not_overflow(implementation, device):
    kv = np.full((1, 4, 256), 3e38, np.float32)
    kv[:, ::2] = -3e38
    _, values = window_at_once(SMALL_KINDS[0], implementation, kv, 0 * kv, device)
    assert np.all(np.abs(values) < 1e38)


@pytest.mark.parametrize("kind", SMALL_KINDS, ids=str)
def test_ten_thousand_random_steps_with_rewinds_equal_raw(kind, device):
    """|kv| is at most 1, and so is every value: within 2e-6 of that."""
    steps = 10_000
    ratio, batch, next_n, page_size, max_pages = kind.compress_ratio, 4, 4, 16, 33
    state_dim = kind.state_dim
    rng = np.random.default_rng(0)
    tables = rng.permutation(batch * max_pages).astype(np.int32).reshape(batch, max_pages)
    ape = rng.standard_normal((ratio, state_dim)).astype(np.float32)
    windows = {"compress_ratio": ratio, "overlap": kind.overlap}
    states = [
        init_state(batch * max_pages, page_size, head_dim=kind.head_dim, **windows, format=format)
        for format in ("raw", "prefix")
    ]

    def step(carry, key):
        states, lengths, worst, num_windows = carry
        keys = jax.random.split(key, 4)
        kv = jax.random.uniform(keys[0], (batch, next_n, state_dim), minval=-1)
        score = 2 * jax.random.normal(keys[1], (batch, next_n, state_dim))
        q_lens = jax.random.randint(keys[2], (batch,), 0, next_n + 1)
        results = [
            paged_kv_compress(
                jnp.concatenate((kv, score), axis=-1),
                ape,
                state,
                tables,
                lengths + q_lens,
                q_lens=q_lens,
                **windows,
                out_dtype=jnp.float32,
                implementation="ffi",
            )
            for state in states
        ]
        (raw, _), (prefix, _) = results
        worst = jnp.maximum(worst, jnp.max(jnp.abs(raw - prefix)))
        num_windows += jnp.sum(jnp.any(raw != 0, axis=-1))
        accepted = jnp.minimum(jax.random.randint(keys[3], (batch,), 0, next_n + 1), q_lens)
        lengths = (lengths + accepted) % (max_pages * page_size - next_n)  # then far back
        return ([state for _, state in results], lengths, worst, num_windows), None

    @jax.jit
    def run_steps(states, keys):
        start = states, jnp.zeros(batch, jnp.int32), jnp.float32(0), jnp.int32(0)
        (_, _, worst, num_windows), _ = jax.lax.scan(step, start, keys)
        return worst, num_windows

    keys = jax.random.split(jax.random.key(1), steps)
    worst, num_windows = run_steps(*jax.device_put((states, keys), device))
    assert num_windows > steps * batch / ratio
    assert 0 < worst <= 2e-6


# ----------------------------------------------------------------------------------- raw_to_prefix

CONVERTED = tuple(  # one request of each length below batch
    cases.case_of(kind, batch - 1, cases.BF16_IN_F32_STATE, batch=batch, page_size=6)
    for kind in SMALL_KINDS
    for batch in (max(14, kind.compress_ratio + 3),)
)


def of_every_length(case):
    operands = cases.make_operands(case)
    operands.kv_lens = operands.q_lens = np.arange(case.batch, dtype=np.int32)
    operands.kv[...], operands.score[...] = 0, -np.inf
    return operands


def convert(case, state, operands, implementation, device):
    tables, kv_lens = (operands.kv_tables, operands.score_tables), operands.kv_lens
    program = functools.partial(
        raw_to_prefix,
        compress_ratio=case.ratio,
        overlap=case.overlap,
        implementation=implementation,
    )
    converted = jax.jit(program)(*jax.device_put((state, tables, kv_lens), device))
    assert converted.format == "prefix"
    return jax.tree.map(np.asarray, converted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CONVERTED, ids=str)
def test_a_converted_state_is_that_of_a_run_in_prefixes(case, implementation, device):
    operands = of_every_length(case)
    raw = run(case, operands, implementation, device)
    want = run(case.in_prefix(), operands, implementation, device)
    got = convert(case, CompressorState(raw.kv, raw.score), operands, implementation, device)
    for name in ("kv", "score"):
        tables = getattr(operands, f"{name}_tables")
        converted = np.zeros((case.num_pages, case.page_size), bool)
        for b, length in enumerate(operands.kv_lens):
            first = max(length // case.ratio - case.overlap, 0) * case.ratio
            page, slot = np.divmod(np.arange(first, length), case.page_size)
            converted[tables[b, page], slot] = True
        rows, expected = getattr(got, name), getattr(want, name)
        check_same_bits(rows[~converted], getattr(raw, name)[~converted])
        if implementation == "ffi":
            check_same_bits(rows[converted], expected[converted])
        else:  # its bits depend on the program
            np.testing.assert_allclose(rows[converted], expected[converted], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("kind", SMALL_KINDS, ids=str)
def test_decoding_goes_on_in_prefixes(kind, dtype, implementation, device):
    """From a state of any raw dtype, with inactive slots, pages that are shared and pages that are
    nowhere: as in format raw from the same rows.
    """
    ratio = kind.compress_ratio
    dtypes = cases.DTypes("float32", dtype, "float32")
    case = cases.case_of(kind, ratio, dtypes, max_len=3 * ratio)
    operands = cases.make_operands(case)
    operands.kv_lens = np.resize([0, -3, ratio + 1, 2 * ratio - 1, 2 * ratio], case.batch)
    operands.kv_lens = operands.kv_lens.astype(np.int32)
    tables = operands.kv_tables, operands.score_tables
    shared = ratio // case.page_size  # whole pages of the first window and the next one
    for table in tables:
        table[10:12, :shared] = table[12, :shared]
    tables[0][3, -(-ratio // case.page_size) // 2] = -1
    tables[1][4, 0] = case.num_pages
    state = CompressorState(operands.kv, operands.score)
    prefixes = convert(case, state, operands, implementation, device)

    operands.kv_lens = np.where(operands.kv_lens > 0, operands.kv_lens + ratio, 0).astype(np.int32)
    f32 = dataclasses.replace(case, dtypes=case.dtypes._replace(state="float32"))
    raw = dataclasses.replace(
        operands, kv=operands.kv.astype(np.float32), score=operands.score.astype(np.float32)
    )
    want = run(f32, raw, implementation, device).kv_comp
    converted = dataclasses.replace(operands, kv=prefixes.kv, score=prefixes.score)
    got = run(case.in_prefix(), converted, implementation, device).kv_comp
    assert np.any(want[operands.kv_lens > 0])
    check_close(got, want, floor=1)


def test_states_of_two_formats_do_not_mix():
    raw, prefix = (
        init_state(2, 8, head_dim=128, compress_ratio=4, format=format)
        for format in ("raw", "prefix")
    )
    tables, lens = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    convert = functools.partial(raw_to_prefix, compress_ratio=4)
    with pytest.raises(TypeError, match="carry"):
        jax.lax.scan(lambda state, _: (convert(state, tables, lens), None), raw, None, 2)
    with pytest.raises(TypeError, match="branch"):
        jax.lax.cond(True, lambda: raw, lambda: prefix)
    with pytest.raises(ValueError, match="prefix"):
        jax.tree.map(jnp.add, raw, prefix)
    with pytest.raises(ValueError, match=r"^state\.format: expected 'raw', got 'prefix'; rows"):
        convert(prefix, tables, lens)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("state", None, TypeError),
        ("state.kv", CompressorState(jnp.zeros((2, 16)), jnp.zeros((2, 16))), ValueError),
        ("block_tables", jnp.zeros((2, 1), jnp.int32), ValueError),
        ("kv_lens", jnp.zeros(1), TypeError),
        ("compress_ratio", 5, ValueError),
        ("implementation", "cuda", ValueError),
    ],
)
def test_raw_to_prefix_names_a_wrong_argument(name, value, error):
    good = {
        "state": init_state(2, 8, head_dim=128, compress_ratio=4),
        "block_tables": jnp.zeros((1, 1), jnp.int32),
        "kv_lens": jnp.ones(1, jnp.int32),
        "compress_ratio": 4,
    }
    with pytest.raises(error, match=rf"^{name}: expected "):
        raw_to_prefix(**good | {name.partition(".")[0]: value})


@pytest.mark.parametrize("empty", [{"num_pages": 0}, {"max_pages": 0}, {"batch": 0}], ids=str)
def test_raw_to_prefix_serves_empty_dimensions(empty):
    sizes = {"num_pages": 2, "max_pages": 1, "batch": 1} | empty
    state = init_state(sizes["num_pages"], 8, head_dim=128, compress_ratio=4)
    tables = jnp.zeros((sizes["batch"], sizes["max_pages"]), jnp.int32)
    got = raw_to_prefix(state, tables, jnp.full(sizes["batch"], 3, jnp.int32), compress_ratio=4)
    np.testing.assert_array_equal(got.kv, state.kv)
