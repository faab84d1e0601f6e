"""The main job: what it prints, what its check catches, and its page accounting."""

import functools
import itertools
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_dsv4 import CompressorState, init_state
from jax_dsv4 import __main__ as main_job

KINDS = ("CSA", "indexer", "HCA")
# Every draft accepted: with 4 tokens a step, an HCA window of 128 is complete in 32 steps.
TINY = ["--batch", "4", "--steps", "48", "--accept", "1", "--page-size", "8"]


def run_tiny(capsys, *arguments):
    """(exit status, stdout) of an in-process run."""
    status = main_job.main([*TINY, *arguments])
    return status, capsys.readouterr().out


@pytest.fixture
def one_layer_each(monkeypatch):
    monkeypatch.setitem(main_job.LAYERS, "flash", (1, 1, 1))


@pytest.mark.parametrize("model", ["flash", "pro"])
def test_the_command_prints_speed_memory_and_an_ok_verdict(device, model):
    platform = {"cpu": "cpu", "gpu": "cuda"}[device.platform]
    # This process may hold most of a GPU's memory already.
    variables = {"JAX_PLATFORMS": platform, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    result = subprocess.run(
        [sys.executable, "-m", "jax_dsv4", "--model", model, *TINY],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | variables,
    )
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert float(re.search(r"tokens/s: ([\d,.]+)", out)[1].replace(",", "")) > 0
    started, finished = map(int, re.search(r"(\d+) started, (\d+) finished", out).groups())
    assert started > finished >= 0
    shares = []
    for kind, layers in zip(KINDS, main_job.LAYERS[model], strict=True):
        row = re.search(rf"^{kind} +(\d+) +([\d.]+) +([\d.]+)% +([\d,]+)$", out, re.MULTILINE)
        assert int(row[1]) == layers
        assert float(row[2]) > 0
        assert int(row[4].replace(",", "")) > 0
        shares.append(float(row[3]))
    assert sum(shares) == pytest.approx(100, abs=0.2)
    verdict = re.search(r"check: OK, (\d+) windows .* \((.*)\), max error ([\d.]+) bf16 ulp", out)
    counts = dict(count.split() for count in verdict[2].split(", "))
    assert tuple(counts) == KINDS
    assert all(int(count) > 0 for count in counts.values())
    assert int(verdict[1]) == sum(map(int, counts.values()))
    assert 0 < float(verdict[3]) <= 1
    assert "decoding 48/48" in result.stderr


@pytest.mark.parametrize("implementation", ["auto", "ffi", "xla"])
@pytest.mark.parametrize(
    ("accept", "state_format"), [("0", "raw"), ("0.7", "raw"), ("0.7", "prefix")]
)
def test_every_implementation_passes_the_check(
    capsys, one_layer_each, implementation, accept, state_format
):
    status, out = run_tiny(
        capsys,
        *("--accept", accept, "--steps", "150"),
        *("--implementation", implementation, "--state-format", state_format),
    )
    assert status == 0
    assert "check: OK" in out


def with_an_error_in_one_channel(call, kv_score, ape, state, tables, kv_lens, **attributes):
    kv_comp, state = call(kv_score, ape, state, tables, kv_lens, **attributes)
    emitted = kv_comp[..., 5] != 0
    return kv_comp.at[..., 5].add(emitted * 0.125), state


def with_a_value_where_there_is_no_window(call, kv_score, *operands, **attributes):
    kv_comp, state = call(kv_score, *operands, **attributes)
    return kv_comp.at[..., 0].set(jax.numpy.where(kv_comp[..., 0] == 0, 1, kv_comp[..., 0])), state


def with_nan(call, *operands, **attributes):
    kv_comp, state = call(*operands, **attributes)
    return kv_comp * jax.numpy.nan, state


def without_ape(call, kv_score, ape, *operands, **attributes):
    return call(kv_score, None, *operands, **attributes)


def with_all_rows_taken_for_real(call, *operands, q_lens, **attributes):
    return call(*operands, **attributes)


def with_rewound_rows_kept(call, kv_score, ape, state, tables, kv_lens, *, q_lens, **attributes):
    """A row once written is not overwritten, as if rejected drafts still counted."""
    kv_comp, written = call(kv_score, ape, state, tables, kv_lens, q_lens=q_lens, **attributes)
    kept = jax.numpy.isfinite(state.score)
    return kv_comp, CompressorState(
        jax.numpy.where(kept, state.kv, written.kv),
        jax.numpy.where(kept, state.score, written.score),
    )


CORRUPTIONS = [
    with_an_error_in_one_channel,
    with_a_value_where_there_is_no_window,
    with_nan,
    without_ape,
    with_rewound_rows_kept,
]


# q_lens counts in a request's last step only: none completes a window of 128 in this run.
@pytest.mark.parametrize(
    ("corrupted", "ratio"),
    [*itertools.product(CORRUPTIONS, [4, 128]), (with_all_rows_taken_for_real, 4)],
)
def test_a_wrong_implementation_fails_the_check(
    capsys, monkeypatch, one_layer_each, corrupted, ratio
):
    """Corrupted for one ratio only: the check must look at each kind."""
    call = main_job.paged_kv_compress

    def patched(*operands, **attributes):
        if attributes["compress_ratio"] != ratio:
            return call(*operands, **attributes)
        return corrupted(call, *operands, **attributes)

    monkeypatch.setattr(main_job, "paged_kv_compress", patched)
    status, out = run_tiny(capsys, "--accept", "0.7", "--steps", "150")
    assert status == 1
    assert "check: MISMATCH" in out


def test_a_run_too_short_to_check_every_kind_says_so(capsys, one_layer_each):
    status, out = run_tiny(capsys, "--steps", "8")
    assert status == 0
    assert "check: INCOMPLETE" in out
    assert "HCA 0)" in out


@pytest.mark.parametrize(
    "arguments",
    [["--batch", "0"], ["--accept", "1.5"], ["--accept", "nan"], ["--next-n", "two"],
     ["--steps", "-1"], ["--page-size", "0"], ["--seed", "-1"], ["--model", "max"],
     ["--implementation", "cuda"], ["--state-format", "bf16"]],
)  # fmt: skip
def test_a_wrong_option_is_named(capsys, arguments):
    with pytest.raises(SystemExit) as exit_info:
        main_job.main(arguments)
    assert exit_info.value.code == 2
    assert f"argument {arguments[0]}: " in capsys.readouterr().err


def test_ctrl_c_ends_the_run_without_a_traceback(capsys, monkeypatch, one_layer_each):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main_job.Scheduler, "settle", interrupt)
    assert main_job.main(TINY) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


@pytest.mark.parametrize("page_size", [1, 3, 32, 100, 128, 600])
@pytest.mark.parametrize("next_n", [1, 4, 130])
@pytest.mark.parametrize("state_format", ["raw", "prefix"])
def test_pages_have_one_owner_and_all_come_back(state_format, page_size, next_n):
    sizes = ["--batch", "5", "--next-n", str(next_n), "--page-size", str(page_size)]
    options = main_job.parse([*sizes, "--state-format", state_format])
    kinds = main_job.kinds_of("flash")
    scheduler = main_job.Scheduler(kinds, options, np.random.default_rng(1))
    while scheduler.finished < 12:
        plan = scheduler.plan(arrivals=scheduler.started < 12)
        for kind in kinds:
            pool, tables = scheduler.pools[kind.name], plan.tables[kind.name]
            owned = tables[tables >= 0]
            assert sorted([*owned, *pool.free]) == list(range(pool.num_pages))
            for span in scheduler.spans(plan):
                assert len(span.tokens) == plan.kv_lens[span.slot]
                assert len(span.tokens) - span.length == plan.q_lens[span.slot]
                first = kind.first_needed(span.length) if state_format == "raw" else span.length
                rows = np.arange(first, len(span.tokens))
                assert np.all(tables[span.slot, rows // page_size] >= 0)
        scheduler.settle(plan)
    assert scheduler.requests == [None] * 5
    for pool in scheduler.pools.values():
        assert sorted(pool.free) == list(range(pool.num_pages))
        assert np.all(pool.tables == -1)


@pytest.mark.parametrize("page_size", [1, 3, 8])
@pytest.mark.parametrize("state_format", ["raw", "prefix"])
def test_pages_reused_as_early_as_they_may_be_change_no_value(
    one_layer_each, state_format, page_size
):
    """Against a run that reuses no page; NaN is in every page that no table has."""
    options = main_job.parse(
        ["--batch", "3", "--page-size", str(page_size), "--state-format", state_format]
    )
    kinds = main_job.kinds_of("flash")
    rng = np.random.default_rng(2)
    scheduler = main_job.Scheduler(kinds, options, rng)
    weights = jax.device_put({kind.name: main_job.random_weights(kind, rng) for kind in kinds})
    step = main_job.make_step(kinds, "ffi")
    reused = {name: pool.init_states() for name, pool in scheduler.pools.items()}
    kept, tables = {}, {}
    for name, pool in scheduler.pools.items():
        own = np.arange(pool.tables.size, dtype=np.int32).reshape(pool.tables.shape)
        tables[name] = own
        kept[name] = [
            init_state(
                own.size,
                page_size,
                head_dim=pool.kind.head_dim,
                compress_ratio=pool.kind.compress_ratio,
                format=state_format,
            )
        ]
    num_windows = 0
    for _ in range(150):
        plan = scheduler.plan()
        for name, pool in scheduler.pools.items():
            unowned = np.setdiff1d(np.arange(pool.num_pages), plan.tables[name])
            poisoned = functools.partial(with_nan_in_pages, pages=unowned)
            reused[name] = jax.tree.map(poisoned, reused[name])
        got, reused = step(reused, weights, plan)
        want, kept = step(kept, weights, plan._replace(tables=tables))
        for kind in kinds:
            for values, expected in zip(got[kind.name], want[kind.name], strict=True):
                np.testing.assert_array_equal(values, expected)
                num_windows += int(np.any(np.asarray(expected != 0), axis=-1).sum())
        scheduler.settle(plan)
    assert scheduler.finished and num_windows


def with_nan_in_pages(pool, pages):
    poisoned = np.array(pool)
    poisoned[pages] = np.nan
    return jax.numpy.array(poisoned)
