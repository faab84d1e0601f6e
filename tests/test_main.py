"""The demo: what it prints, what its check catches, and its page accounting."""

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_dsv4 import RECORD_FORMATS, CompressorState, init_state, live
from jax_dsv4.demo import cli, model, report, scheduler
from jax_dsv4.demo.scheduler import Scheduler

KINDS = ("CSA", "indexer", "HCA")
# Every draft accepted: with 4 tokens a step, an HCA window of 128 is complete in 32 steps.
TINY = ["--batch", "4", "--steps", "48", "--accept", "1", "--page-size", "8"]
# Chunks that begin anywhere, beside what decodes; most requests start from a cached prefix.
PROMPTS = ["--prompt", "600,70,333", "--chunk", "101", "--shared", "1"]
PROMPTS += ["--batch", "3", "--steps", "150", "--accept", "0.7"]


def run_tiny(capsys, *arguments):
    """(exit status, stdout) of an in-process run."""
    status = cli.main([*TINY, *arguments])
    return status, capsys.readouterr().out


@pytest.fixture
def one_layer_each(monkeypatch):
    monkeypatch.setitem(model.LAYERS, "flash", (1, 1, 1))


@pytest.mark.parametrize("model_name", ["flash", "pro"])
def test_the_command_prints_speed_memory_and_an_ok_verdict(device, model_name):
    platform = {"cpu": "cpu", "gpu": "cuda"}[device.platform]
    # This process may hold most of a GPU's memory already.
    variables = {"JAX_PLATFORMS": platform, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    result = subprocess.run(
        [sys.executable, "-m", "jax_dsv4", "--model", model_name, *TINY],
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
    for kind, layers in zip(KINDS, model.LAYERS[model_name], strict=True):
        row = re.search(
            rf"^{kind} +(\d+) +([\d.]+) +([\d.]+)% +([\d,]+) +([\d,]+)$", out, re.MULTILINE
        )
        assert int(row[1]) == layers
        assert float(row[2]) > 0
        assert int(row[4].replace(",", "")) > 0 and int(row[5].replace(",", "")) > 0
        shares.append(float(row[3]))
    assert sum(shares) == pytest.approx(100, abs=0.2)
    verdict = re.search(r"check: OK, (\d+) records .* \((.*)\), max error ([\d.]+) of", out)
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


@pytest.mark.parametrize("record_format", RECORD_FORMATS)
def test_every_format_of_records_passes_the_check(capsys, one_layer_each, record_format):
    status, out = run_tiny(capsys, "--records", record_format)
    indexer = record_format if record_format in ("f32", "bf16", "mxfp4") else "fp8_block128"
    assert status == 0
    assert f"records: CSA {record_format}, indexer {indexer}, HCA {record_format}\n" in out
    assert "check: OK" in out


@pytest.mark.parametrize("state_format", ["raw", "prefix"])
def test_prompts_pass_the_check(capsys, one_layer_each, state_format):
    status, out = run_tiny(capsys, *PROMPTS, "--state-format", state_format)
    assert status == 0
    assert "check: OK" in out
    found = re.search(r"\((\d+) in the same time; (\d+) more .* with (\d+) requests", out)
    prefilled, reused, sharing = map(int, found.groups())
    assert prefilled > 600 and reused >= 256 * sharing > 256
    found = re.search(r"prompts: (\d+), of .* without: (\d+), of", out)
    with_prompts, without = map(int, found.groups())
    assert with_prompts > 6 and without > 0 and with_prompts + without == 150


def test_prompts_in_jnp_pass_the_check(capsys, one_layer_each):
    sizes = ["--prompt", "300,270", "--steps", "20", "--batch", "2", "--accept", "1"]
    status, out = run_tiny(capsys, *PROMPTS, *sizes, "--implementation", "xla")
    assert status == 0
    assert "check: OK" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--chunk", "1", "--prompt", "30,300", "--steps", "350"],
        ["--chunk", "5000", "--prompt", "5000", "--steps", "40"],
        ["--next-n", "1", "--page-size", "100", "--prompt", "7000,6500", "--chunk", "999"],
        ["--next-n", "7", "--prompt", "20000,257", "--chunk", "1001", "--state-format", "prefix"],
    ],
    ids=" ".join,
)
def test_prompts_of_any_length_and_chunks_pass_the_check(capsys, one_layer_each, arguments):
    status, out = run_tiny(capsys, *PROMPTS, *arguments)
    assert status == 0
    assert "check: OK" in out


def with_an_error_in_one_channel(call, kv_score, compressor, *operands, **attributes):
    weight = compressor.norm_weight.at[5].multiply(1.25)
    compressor = dataclasses.replace(compressor, norm_weight=weight)
    return call(kv_score, compressor, *operands, **attributes)


def with_nan(call, kv_score, *operands, **attributes):
    return call(kv_score * jax.numpy.nan, *operands, **attributes)


def without_ape(call, kv_score, compressor, *operands, **attributes):
    return call(kv_score, dataclasses.replace(compressor, ape=None), *operands, **attributes)


def without_norm(call, kv_score, compressor, *operands, **attributes):
    compressor = dataclasses.replace(compressor, norm_weight=None)
    return call(kv_score, compressor, *operands, **attributes)


def with_the_next_position(call, kv_score, compressor, *operands, **attributes):
    table = jax.numpy.roll(compressor.cos_sin_cache, -1, axis=0)
    compressor = dataclasses.replace(compressor, cos_sin_cache=table)
    return call(kv_score, compressor, *operands, **attributes)


def with_no_hadamard(call, kv_score, compressor, *operands, **attributes):
    compressor = dataclasses.replace(compressor, hadamard=False)
    return call(kv_score, compressor, *operands, **attributes)


def with_all_rows_taken_for_real(call, *operands, q_lens, **attributes):
    return call(*operands, **attributes)


def with_rewound_rows_kept(call, kv_score, compressor, cache, *operands, **attributes):
    """A row once written is not overwritten, as if rejected drafts still counted."""
    written = call(kv_score, compressor, cache, *operands, **attributes)
    kept = jax.numpy.isfinite(cache.state.score)
    state = CompressorState(
        jax.numpy.where(kept, cache.state.kv, written.state.kv),
        jax.numpy.where(kept, cache.state.score, written.state.score),
    )
    return dataclasses.replace(written, state=state)


def with_the_next_page(call, kv_score, compressor, cache, tables, *operands, **attributes):
    num_pages, owned = cache.records.pool.shape[-2], tables.records >= 0
    pages = jax.numpy.where(owned, (tables.records + 1) % num_pages, -1)
    tables = dataclasses.replace(tables, records=pages)
    return call(kv_score, compressor, cache, tables, *operands, **attributes)


def with_another_byte_changed(call, *operands, **attributes):
    """The last one of a pool: of padding, or of a record that few steps complete."""
    cache = call(*operands, **attributes)
    pool = cache.records.pool.at[attributes["layer"], -1, -1].add(1)
    return dataclasses.replace(cache, records=dataclasses.replace(cache.records, pool=pool))


CORRUPTIONS = [
    with_an_error_in_one_channel,
    with_nan,
    without_ape,
    without_norm,
    with_the_next_position,
    with_rewound_rows_kept,
    with_the_next_page,
    with_another_byte_changed,
]


# q_lens counts in a request's last step only: none completes a window of 128 in this run.
@pytest.mark.parametrize(
    ("corrupted", "kind"),
    [
        *itertools.product(CORRUPTIONS, range(3)),
        (with_all_rows_taken_for_real, 0),
        (with_all_rows_taken_for_real, 1),
        (with_no_hadamard, 1),
    ],
)
def test_a_wrong_implementation_fails_the_check(
    capsys, monkeypatch, one_layer_each, corrupted, kind
):
    """Corrupted for one kind only: the check must look at each."""
    call, layers = model.decode_records, model.list_layers("flash")[kind]

    def patched(kv_score, compressor, *operands, **attributes):
        found = compressor.head_dim, compressor.compress_ratio
        if found != (layers.head_dim, layers.compress_ratio):
            return call(kv_score, compressor, *operands, **attributes)
        return corrupted(call, kv_score, compressor, *operands, **attributes)

    monkeypatch.setattr(model, "decode_records", patched)
    status, out = run_tiny(capsys, "--accept", "0.7", "--steps", "150")
    assert status == 1
    assert "check: MISMATCH" in out
    records_are_right = "max error 0." in out
    assert records_are_right == (corrupted is with_another_byte_changed)
    if records_are_right:
        assert int(re.search(r"other bytes: (\d+)", out)[1]) > 0


@pytest.mark.parametrize("corrupted", CORRUPTIONS)
def test_a_wrong_implementation_fails_the_check_of_prompts(
    capsys, monkeypatch, one_layer_each, corrupted
):
    patched = functools.partial(corrupted, model.ragged_records)
    monkeypatch.setattr(model, "ragged_records", patched)
    status, out = run_tiny(capsys, *PROMPTS)
    assert status == 1
    assert "check: MISMATCH" in out


def without_rows_to_resume_at(monkeypatch):
    """What a request needs that starts from a prefix is not stored."""
    monkeypatch.setattr(cli, "live", lambda max_rewind, resume_every: live(max_rewind=max_rewind))


def without_rows_to_rewind_to(monkeypatch):
    """What a step needs after rejected drafts is not stored."""
    never = functools.partial(live, max_rewind=0)
    monkeypatch.setattr(cli, "live", lambda max_rewind, resume_every: never())


def without_shared_pages(monkeypatch):
    """A request that starts from a prefix has its own pages in the prefix's place."""
    copy_tables = scheduler.Pages.copy_tables
    monkeypatch.setattr(
        scheduler.Pages,
        "copy_tables",
        lambda self, requests: copy_tables(self, [None] * len(requests)),
    )


def with_prefixes_shared_before_they_are_there(monkeypatch):
    ready = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(scheduler.Prefix, "ready", ready, raising=False)


def with_chunks_one_row_late(monkeypatch):
    """Of every request but the first one."""
    call = model.ragged_records

    def late(kv_score, compressor, cache, tables, kv_lens, cu_q_lens, **attributes):
        late = cu_q_lens.at[1:-1].add(1)
        return call(kv_score, compressor, cache, tables, kv_lens, late, **attributes)

    monkeypatch.setattr(model, "ragged_records", late)


@pytest.mark.parametrize(
    "break_it",
    [
        without_rows_to_resume_at,
        without_rows_to_rewind_to,
        without_shared_pages,
        with_prefixes_shared_before_they_are_there,
        with_chunks_one_row_late,
    ],
)
def test_prompts_that_go_wrong_fail_the_check(capsys, monkeypatch, one_layer_each, break_it):
    break_it(monkeypatch)
    status, out = run_tiny(capsys, *PROMPTS, "--prompt", "600")
    assert status == 1
    assert "check: MISMATCH" in out


def test_a_run_too_short_to_check_every_kind_says_so(capsys, one_layer_each):
    status, out = run_tiny(capsys, "--steps", "8")
    assert status == 3
    assert "check: INCOMPLETE" in out
    assert "HCA 0)" in out


@pytest.mark.parametrize(
    "arguments",
    [["--batch", "0"], ["--accept", "1.5"], ["--accept", "nan"], ["--next-n", "two"],
     ["--steps", "-1"], ["--page-size", "0"], ["--seed", "-1"], ["--model", "max"],
     ["--implementation", "cuda"], ["--state-format", "bf16"], ["--records", "int8"],
     ["--prompt", "0"], ["--prompt", "300,x"], ["--chunk", "0"], ["--shared", "2"],
     ["--json", "."],
     ["--json", "no/such/folder/figures.json"]],
)  # fmt: skip
def test_a_wrong_option_is_named(capsys, arguments):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert f"argument {arguments[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--batch", "99999999999"], ["--page-size", "2147483648"], ["--page-size", "2147483647"],
     ["--prompt", "99999999999"]],
)  # fmt: skip
def test_caches_that_no_machine_has_room_for_are_a_wrong_option(capsys, one_layer_each, arguments):
    assert cli.main([*TINY, *arguments]) == cli.WRONG_OPTION
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ") and arguments[0] in err[-1]


def test_a_chunk_longer_than_every_prompt_has_room_for_these(capsys, one_layer_each):
    assert run_tiny(capsys, "--prompt", "10,300", "--chunk", "1000000000")[0] == 0


def test_ctrl_c_ends_the_run_without_a_traceback(capsys, monkeypatch, one_layer_each):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Scheduler, "settle", interrupt)
    assert cli.main(TINY) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_the_help_lists_every_exit_status(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    _, statuses = " ".join(capsys.readouterr().out.split()).split("Exit status: ")
    listed = [int(part.split()[0]) for part in statuses.split("; ")]
    assert listed == sorted(
        {*cli.STATUS.values(), cli.WRONG_OPTION, cli.INTERRUPTED, cli.PIPE_CLOSED}
    )


def test_output_into_a_pipe_that_is_closed_ends_the_run_without_a_traceback():
    """As in ``python -m jax_dsv4 | head -1``."""
    with subprocess.Popen(
        [sys.executable, "-m", "jax_dsv4", "--batch", "1", "--steps", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": ""},  # flushes at exit, too
    ) as process:
        assert process.stdout.readline().startswith("DeepSeek-V4-Flash")
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141, err
    assert set(err.splitlines()) <= {"compiling", "decoding 1/1"}


def numbers_in(value):
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers_in(part)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("prompt", [[], [300, 70]])
def test_json_has_all_that_is_printed(capsys, one_layer_each, tmp_path, prompt):
    path = tmp_path / "figures.json"
    lengths = ["--prompt", ",".join(map(str, prompt))] if prompt else []
    status, out = run_tiny(capsys, "--json", str(path), *lengths)
    figures = json.loads(path.read_text())
    assert status == 0
    options, calls, check = figures["options"], figures["calls"], figures["check"]
    assert options == {
        **{"model": "flash", "batch": 4, "next_n": 4, "steps": 48, "accept": 1, "page_size": 8},
        **{"seed": 0, "state_format": "raw", "records": "fp8_ds_mla", "implementation": "auto"},
        **{"prompt": prompt, "chunk": 256, "shared": 0.5},
    }
    formats = dict(zip(KINDS, ("fp8_ds_mla", "fp8_block128", "fp8_ds_mla"), strict=True))
    assert figures["record_formats"] == formats
    assert set(figures["versions"]) == {"jax_dsv4", "jax", "jaxlib", "numpy", "python"}
    assert figures["versions"]["jax"] == jax.__version__
    assert figures["platform"] == jax.default_backend()
    assert figures["device"] == jax.devices()[0].device_kind
    assert check["verdict"] == "OK"
    assert list(check["windows_by_kind"]) == list(KINDS)
    assert list(calls["by_kind"]) == [*KINDS, "all"]
    printed = re.findall(r"(?<![\w.-])[\d,]+(?:\.\d+)?\b", out.partition("requests: ")[2])
    have = {100 * kind["share"] for kind in calls["by_kind"].values()} | set(numbers_in(figures))
    assert ("prefill" in figures) == bool(prompt)
    for text in printed:
        digits, number = len(text.partition(".")[2]), float(text.replace(",", ""))
        assert any(abs(number - value) <= 0.5001 * 10**-digits for value in have), text
    decoding, kinds = figures["decoding"], [calls["by_kind"][name] for name in KINDS]
    tokens_per_second = decoding["tokens_accepted"] / decoding["seconds"]
    assert decoding["tokens_per_second"] == pytest.approx(tokens_per_second)
    us_per_step = sum(kind["calls_per_step"] * kind["us_per_call"] for kind in kinds)
    assert calls["ms_per_step"] == pytest.approx(us_per_step / 1e3)
    assert calls["by_kind"]["all"]["us_per_call"] == pytest.approx(us_per_step / len(kinds))


def test_json_has_null_for_an_error_that_is_no_number(
    capsys, monkeypatch, one_layer_each, tmp_path
):
    patched = functools.partial(with_nan, model.decode_records)
    monkeypatch.setattr(model, "decode_records", patched)
    status, out = run_tiny(capsys, "--json", str(tmp_path / "figures.json"))
    assert (status, "max error nan" in out) == (1, True)
    found = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)["check"]
    assert (found["verdict"], found["max_error"]) == ("MISMATCH", None)


def test_progress_is_a_line_per_quarter_or_a_bar_on_a_terminal(capsys, monkeypatch):
    assert list(report.track(48)) == list(range(48))
    assert capsys.readouterr().err == "".join(f"decoding {n}/48\n" for n in (12, 24, 36, 48))
    assert list(report.track(2)) == [0, 1]
    assert capsys.readouterr().err == "decoding 1/2\ndecoding 2/2\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(report.track(48)) == list(range(48))
    last = capsys.readouterr().err.split("\r")[-1]
    assert re.match(r"decoding: 100%\|.*\| 48/48 ", last)


def make_demo(arguments, seed):
    options = cli.parse(arguments)
    layers_of_kinds, rng = model.list_layers("flash"), np.random.default_rng(seed)
    return layers_of_kinds, cli.make_scheduler(layers_of_kinds, options, rng)


@pytest.mark.parametrize("page_size", [1, 3, 32, 100, 128, 600])
@pytest.mark.parametrize("next_n", [1, 4, 130])
@pytest.mark.parametrize("state_format", ["raw", "prefix"])
def test_pages_have_one_owner_and_all_come_back(state_format, page_size, next_n):
    sizes = ["--batch", "5", "--next-n", str(next_n), "--page-size", str(page_size)]
    kinds, scheduler = make_demo([*sizes, "--state-format", state_format], seed=1)
    while scheduler.finished < 12:
        plan = scheduler.plan(arrivals=scheduler.started < 12)
        for kind in kinds:
            pages, tables = scheduler.pages[kind.name], plan.tables[kind.name]
            for pool, table in ((pages.state, tables.state), (pages.records, tables.records)):
                owned = table[table >= 0]
                assert sorted([*owned, *pool._free]) == list(range(pool.num_pages))
            for span in scheduler.list_spans(plan):
                assert len(span.tokens) == plan.kv_lens[span.slot]
                assert len(span.tokens) - span.length == plan.q_lens[span.slot]
                first = span.length
                if state_format == "raw":
                    open_window = span.length // kind.compress_ratio
                    first = max(open_window - kind.overlap, 0) * kind.compress_ratio
                rows = np.arange(first, len(span.tokens))
                assert np.all(tables.state[span.slot, rows // page_size] >= 0)
                windows = np.arange(len(span.tokens) // kind.compress_ratio)
                assert np.all(tables.records[span.slot, windows // pages.records.page_size] >= 0)
        scheduler.settle(plan)
    assert scheduler.requests == [None] * 5
    for pages in scheduler.pages.values():
        for pool in (pages.state, pages.records):
            assert sorted(pool._free) == list(range(pool.num_pages))
            assert pool.num_free == pool.num_pages
            assert np.all(pool.tables == -1)


@pytest.mark.parametrize("page_size", [3, 32, 100])
@pytest.mark.parametrize("state_format", ["raw", "prefix"])
def test_prompts_own_few_pages_and_share_those_of_prefixes(state_format, page_size):
    """Of the state, however long a prompt is; and nothing is lost as requests come and go."""
    sizes = ["--batch", "5", "--page-size", str(page_size), "--state-format", state_format]
    prompts = ["--prompt", "3000,20000,700,40", "--chunk", "1500", "--shared", "0.8"]
    _, demo = make_demo([*sizes, *prompts], seed=3)
    record_pages, sharing = demo.record_pages, 0
    while demo.finished < 20:
        plan = demo.plan(arrivals=demo.started < 20)
        assert np.all(np.diff(plan.cu_q_lens) == plan.q_lens)
        assert plan.cu_q_lens[-1] <= plan.tokens.size
        for pages, tables in ((demo.pages[name], plan.tables[name]) for name in KINDS):
            for pool, table in ((pages.state, tables.state), (pages.records, tables.records)):
                owned = [*pool.tables[pool.tables >= 0]]
                assert sorted([*owned, *pool._free]) == list(range(pool.num_pages))
                users = {}
                for slot, page in np.argwhere(table >= 0):
                    users.setdefault(table[slot, page], set()).add((slot, page))
                for places in users.values():
                    if len(places) > 1:
                        found = {demo.requests[slot].prefix for slot, _ in places}
                        (prefix,), (page,) = found, {page for _, page in places}
                        rows = len(prefix.tokens)
                        rows //= 1 if pool is pages.state else pages.compress_ratio
                        assert (page + 1) * pool.page_size <= rows
                        sharing += 1
        for span in demo.list_spans(plan):
            request, prefix = demo.requests[span.slot], demo.requests[span.slot].prefix
            if prefix:
                have = request.tokens[: len(prefix.tokens)]
                np.testing.assert_array_equal(have, prefix.tokens)
        demo.settle(plan)
    assert demo.requests == [None] * 5 and sharing and demo.sharing
    while demo._drop_prefix():
        pass
    assert demo.prefixes == [] and demo.record_pages == record_pages
    for name in KINDS:
        for pool in demo.pages[name][:2]:
            assert pool.num_free == pool.num_pages


@pytest.mark.parametrize("page_size", [1, 3, 8])
@pytest.mark.parametrize("state_format", ["raw", "prefix"])
def test_pages_reused_as_early_as_they_may_be_change_no_value(
    one_layer_each, state_format, page_size
):
    """Against a run that reuses no page; NaN is in every page that no table has."""
    arguments = ["--batch", "3", "--page-size", str(page_size), "--state-format", state_format]
    kinds, scheduler = make_demo(arguments, seed=2)
    weights = jax.device_put({kind.name: model.make_weights(kind, scheduler.rng) for kind in kinds})
    step = model.make_step(kinds, implementation="ffi")
    reused, kept, tables = {}, {}, {}
    for kind in kinds:
        name, pages = kind.name, scheduler.pages[kind.name]
        reused[name] = model.init_layers(kind, pages)
        own = np.arange(pages.state.tables.size, dtype=np.int32).reshape(pages.state.tables.shape)
        tables[name] = own
        state = init_state(
            own.size,
            page_size,
            head_dim=kind.head_dim,
            compress_ratio=kind.compress_ratio,
            layers=kind.count,
            format=state_format,
        )
        kept[name] = dataclasses.replace(model.init_layers(kind, pages), state=state)
    num_windows = 0
    for _ in range(150):
        plan = scheduler.plan()
        own_pages = {}
        for name, pages in scheduler.pages.items():
            unowned = np.setdiff1d(np.arange(pages.state.num_pages), plan.tables[name].state)
            poisoned = functools.partial(with_nan_in_pages, pages=unowned)
            state = jax.tree.map(poisoned, reused[name].state)
            reused[name] = dataclasses.replace(reused[name], state=state)
            own_pages[name] = dataclasses.replace(plan.tables[name], state=tables[name])
        reused = step(reused, weights, plan)
        kept = step(kept, weights, plan._replace(tables=own_pages))
        for kind in kinds:
            got, want = reused[kind.name].records.pool, kept[kind.name].records.pool
            np.testing.assert_array_equal(got, want)
            spans = scheduler.list_spans(plan)
            num_windows += sum(len(span.windows(kind.compress_ratio)) for span in spans)
        scheduler.settle(plan)
    assert scheduler.finished and num_windows


def with_nan_in_pages(pool, pages):
    poisoned = np.array(pool)
    poisoned[:, pages] = np.nan  # in every layer
    return jax.numpy.array(poisoned)
