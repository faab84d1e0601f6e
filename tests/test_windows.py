"""Which windows a step completes."""

import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jax_dsv4 import (
    CompletedWindows,
    _config,
    completed_windows,
    init_state,
    num_compressed,
    paged_kv_compress,
    ragged_windows,
)

INT32_MIN, INT32_MAX = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def around_window_ends(ratio, next_n, with_q_lens):
    """Pairs of a length and a q_len, with those that may overflow."""
    around = [edge + by for edge in (0, ratio, 2 * ratio, 5 * ratio) for by in range(-2, 3)]
    lengths = [*around, INT32_MIN, INT32_MAX, INT32_MAX - ratio]
    q_lens = [INT32_MIN, -1, 0, 1, next_n - 1, next_n, next_n + 1, INT32_MAX]
    return list(itertools.product(lengths, q_lens if with_q_lens else [next_n]))


def windows_that_end_in_new_tokens(ratio, length, n):
    return [p // ratio for p in range(max(length - n, 0), length) if (p + 1) % ratio == 0]


@pytest.mark.parametrize("ratio", _config.RATIOS)
@pytest.mark.parametrize("with_q_lens", (False, True))
@pytest.mark.parametrize("next_n", (1, 4, 129))
def test_num_compressed_counts_the_windows_that_end_in_the_new_tokens(ratio, with_q_lens, next_n):
    pairs = around_window_ends(ratio, next_n, with_q_lens)
    want = [
        sum((p + 1) % ratio == 0 for p in range(max(length - min(n, next_n), 0), length))
        for length, n in pairs
    ]
    kv_lens, q_lens = np.array(pairs, np.int32).T
    got = num_compressed(
        kv_lens, compress_ratio=ratio, next_n=next_n, q_lens=q_lens if with_q_lens else None
    )
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("ratio", _config.RATIOS)
@pytest.mark.parametrize("overlap", (None, False, True))
@pytest.mark.parametrize("next_n", (1, 4, 129))
@pytest.mark.parametrize("with_q_lens", (False, True))
def test_completed_windows_are_those_that_end_in_the_new_tokens(
    ratio, overlap, next_n, with_q_lens
):
    pairs = around_window_ends(ratio, next_n, with_q_lens)
    kv_lens, q_lens = np.array(pairs, np.int32).T
    program = functools.partial(
        completed_windows, compress_ratio=ratio, overlap=overlap, next_n=next_n
    )
    got = jax.jit(program)(kv_lens, q_lens=q_lens if with_q_lens else None)
    assert isinstance(got, CompletedWindows)
    assert [x.dtype for x in got] == [jnp.int32, jnp.bool_, jnp.int32]
    assert {x.shape for x in got} == {(len(pairs), -(-next_n // ratio))}
    window, valid, position = map(np.asarray, got)
    for b, (length, q_len) in enumerate(pairs):
        want = windows_that_end_in_new_tokens(ratio, length, min(q_len, next_n))
        assert window[b, : len(want)].tolist() == want
        assert position[b, : len(want)].tolist() == [w * ratio for w in want]
        np.testing.assert_array_equal(valid[b], np.arange(window.shape[1]) < len(want))
    np.testing.assert_array_equal(window[~valid], -1)
    np.testing.assert_array_equal(position[~valid], -1)
    lens = q_lens if with_q_lens else None
    count = num_compressed(kv_lens, compress_ratio=ratio, next_n=next_n, q_lens=lens)
    np.testing.assert_array_equal(valid.sum(1), count)


@pytest.mark.parametrize("ratio", (4, 128))
def test_rows_of_kv_comp_hold_the_windows_named(ratio):
    """A token's kv is its window's number plus 1, and so is a window's compressed value."""
    head_dim, next_n, batch = 128, 2 * ratio + 3, 9
    state_dim = head_dim * (1 + (ratio == 4))
    kv_lens = np.array([0, 1, ratio, ratio + 3, 2 * ratio, 3 * ratio - 1, 3 * ratio, 3, ratio])
    kv_lens, q_lens = kv_lens.astype(np.int32), np.full(batch, next_n, np.int32)
    q_lens[-2:] = 0, 1
    state = init_state(batch, 4 * ratio, head_dim=head_dim, compress_ratio=ratio)
    tables = np.arange(batch, dtype=np.int32)[:, None]
    scores = np.zeros(state_dim, np.float32)
    scores[:-head_dim] = -np.inf  # the half that belongs to the window after

    def kv_score(positions):
        kv = np.repeat((positions // ratio + 1)[..., None], state_dim, -1)
        return np.concatenate([kv, np.broadcast_to(scores, kv.shape)], -1).astype(np.float32)

    step = functools.partial(paged_kv_compress, compress_ratio=ratio, out_dtype=jnp.float32)
    before = np.tile(np.arange(3 * ratio), (batch, 1))
    _, state = step(kv_score(before), None, state, tables, np.full(batch, 3 * ratio, np.int32))
    positions = (kv_lens - q_lens)[:, None] + np.arange(next_n)
    kv_comp, _ = step(kv_score(positions), None, state, tables, kv_lens, q_lens=q_lens)
    window, valid, _ = completed_windows(
        kv_lens, compress_ratio=ratio, next_n=next_n, q_lens=q_lens
    )
    assert np.sum(valid) == 10
    np.testing.assert_array_equal(kv_comp[..., 0], np.where(valid, window + 1, 0))


def test_lengths_may_be_plain_lists():
    options = {"compress_ratio": 4, "next_n": 5, "q_lens": [5, 1, 0]}
    assert num_compressed([4, 9, 8], **options).tolist() == [1, 0, 0]
    assert completed_windows([9, 9, 8], **options).window.tolist() == [[1, -1], [-1, -1], [-1, -1]]
    assert completed_windows([9], compress_ratio=4, next_n=6).position.tolist() == [[0, 4]]


def test_lengths_may_be_empty_lists():
    none = np.zeros(0, np.int32)
    for kv_lens, q_lens in itertools.product(([], none), ([], none, None)):
        options = {"compress_ratio": 4, "next_n": 5, "q_lens": q_lens}
        assert num_compressed(kv_lens, **options).shape == (0,)
        assert completed_windows(kv_lens, **options).window.shape == (0, 2)
        got = ragged_windows([0], kv_lens, num_rows=9, compress_ratio=4)
        assert [x.tolist() for x in got] == [[-1, -1]] * 2
    with pytest.raises(TypeError, match=r"^kv_lens: expected int32, got float32"):
        num_compressed([none.astype(np.float32)], compress_ratio=4, next_n=5)
    with pytest.raises(ValueError, match=r"^kv_lens: expected shape \[B\], got \[1, 0\]"):
        num_compressed([[]], compress_ratio=4, next_n=5)


def test_strict_promotion_and_64_bits_change_nothing():
    lens = np.array([4, 9, INT32_MAX], np.int32)
    options = {"compress_ratio": np.int64(4), "next_n": np.int64(5), "q_lens": lens}
    want = jax.tree.map(np.asarray, completed_windows(lens, **options))
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        got = completed_windows(lens, **options)
        assert [x.dtype for x in got] == [x.dtype for x in want]
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("helper", (num_compressed, completed_windows))
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("kv_lens", np.ones(3), TypeError),
        ("kv_lens", np.ones(3, np.int64), TypeError),
        ("kv_lens", np.ones(3, np.uint32), TypeError),
        ("kv_lens", [1.5, 2, 3], TypeError),
        ("kv_lens", "abc", TypeError),
        ("kv_lens", np.int32(3), ValueError),
        ("kv_lens", np.ones((3, 1), np.int32), ValueError),
        ("q_lens", np.full(3, 2**33), TypeError),
        ("q_lens", np.ones(3, np.float32), TypeError),
        ("q_lens", np.ones(2, np.int32), ValueError),
        ("compress_ratio", 0, ValueError),
        ("compress_ratio", 5, ValueError),
        ("overlap", 1, TypeError),
        ("next_n", 0, ValueError),
        ("next_n", 2.5, TypeError),
        ("next_n", jnp.int32(2), TypeError),
    ],
)
def test_a_wrong_argument_is_named(helper, name, value, error):
    good = {"kv_lens": np.ones(3, np.int32), "q_lens": np.ones(3, np.int32)}
    good |= {"compress_ratio": 4, "next_n": 1}
    with pytest.raises(error, match=f"^{name}: expected "):
        helper(**good | {name: value})


def test_an_exported_call_returns_windows():
    def call(lens):
        return completed_windows(lens, compress_ratio=4, next_n=4)

    lens = np.array([8, 13, 0], np.int32)
    exported = jax.export.export(jax.jit(call))(lens)
    got, want = jax.export.deserialize(exported.serialize()).call(lens), call(lens)
    assert type(got) is type(want)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)
