"""The engine in examples/: a whole model's tokens, against those that transformers gave.

The golden run is three prompts with 130 tokens each. Every other reference is ``forward`` on a
whole sequence at once, which reproduces the golden run.
"""

import collections
import contextlib
import dataclasses
import functools
import gzip
import importlib.metadata
import json
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.engine import __main__ as command_line
from examples.engine import golden, measure
from examples.engine.model import CSA, Batch, Sizes, Tables, forward, init_caches
from examples.engine.server import LEAST, Engine, Options, Pages, look_up, no_draft
from examples.engine.weights import (
    TINY,
    list_shapes,
    load_checkpoint,
    load_tiny,
    make_random,
)
from jax_dsv4 import OutOfPages

SIZES = Sizes(
    128, 8, 3, 38, 38, 3
)  # of one request of up to 300 tokens, the whole sequence at once
CAPACITY, LAST = 300, golden.NEW_TOKENS
MARGIN = 1e-4  # the gap of two logits below which f32 may choose either token
OPTIONS = Options(batch=3, chunk=64, drafts=3)
ROWS = {"raw": 1, "prefix": 8}  # of a page of a state


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def run():
    return golden.load_golden()


@functools.cache
def tiny(device):
    with jax.default_device(device):
        return load_tiny()


@functools.cache
def engine_of(device, state_format):
    with jax.default_device(device):
        # With a row a page, a page that is missing is a row that is.
        options = OPTIONS._replace(state_format=state_format, state_rows=ROWS[state_format])
        return Engine(*tiny(device), options)


def use(engine):
    """An engine that is compiled once, and that every test leaves as it found it."""
    (group,) = engine.groups
    group.draft, group.options = no_draft, engine.options
    engine.stats = type(engine.stats)()
    yield engine
    assert not engine.busy
    engine.drop_prefixes()
    assert engine.pages_in_use() == 0


@pytest.fixture
def engine(on_device, request):
    yield from use(engine_of(on_device, getattr(request, "param", "raw")))


@pytest.fixture
def cpu_engine():
    """The same, for tests of what happens on the host."""
    with jax.default_device(cpu := jax.devices("cpu")[0]):
        yield from use(engine_of(cpu, "raw"))


both_formats = pytest.mark.parametrize("engine", ["raw", "prefix"], indirect=True)


class Whole:
    """``forward`` on a whole sequence."""

    def __init__(self, config, params, last=LAST, capacity=CAPACITY, sizes=SIZES, **options):
        self.config, self.capacity, self.last = config, capacity, last
        self.caches = init_caches(config, sizes, **options)
        self.sizes = sizes
        step = functools.partial(forward, config, params, page_tokens=128, next_n=last)
        self.step = jax.jit(step, donate_argnames="caches")

    def __call__(self, tokens):
        """The logits of the last positions."""
        n = len(tokens)
        rows = np.pad(np.array(tokens, np.int32), (0, self.capacity - n))
        lens, cu_q_lens = np.array([n], np.int32), np.array([0, n], np.int32)
        pages = (self.sizes.window_pages, self.sizes.csa_pages, self.sizes.hca_pages)
        tables = (np.arange(p, dtype=np.int32)[None] for p in (*pages, self.sizes.record_pages))
        batch = Batch(rows, lens, lens, cu_q_lens, Tables(*tables))
        self.caches, _, logits = self.step(caches=self.caches, batch=batch)
        return np.asarray(logits)[0]


@functools.cache
def whole_of(device):
    with jax.default_device(device):
        return Whole(*tiny(device))


def gaps(logits):
    """Between the two largest."""
    top = np.sort(logits, axis=-1)
    return top[..., -1] - top[..., -2]


def assert_greedy(request, whole):
    """Every new token is the likeliest one behind those before it."""
    output = np.array(request.output)
    assert request.status == "finished" and len(output) == request.max_tokens
    logits = whole(request.tokens[:-1])[-len(output) :]
    wrong = np.flatnonzero((logits.argmax(-1) != output) & (gaps(logits) > MARGIN))
    assert not wrong.size, f"token {wrong[0]} of prompt {request.tokens[: request.prompt]}"


def prompts_of(rng, lengths):
    return [rng.integers(256, size=n).tolist() for n in lengths]


# --- The golden run ---------------------------------------------------------------------------


def test_a_whole_sequence_gives_the_golden_logits_and_records(run, on_device):
    whole = whole_of(on_device)
    for i, (prompt, tokens) in enumerate(zip(run.prompts, run.tokens, strict=True)):
        logits = whole([*prompt, *tokens[:-1]])
        assert logits.argmax(-1).tolist() == tokens
        np.testing.assert_allclose(
            logits[run.steps], run.logits[i], rtol=0, atol=golden.MAX_LOGITS_ERROR
        )


@both_formats
def test_random_chunks_and_rejected_drafts_give_the_golden_tokens(run, engine):
    rng, (group,) = np.random.default_rng(1), engine.groups
    group.draft = golden.spoilt_drafts(run, rng)
    requests = [engine.submit(p, golden.NEW_TOKENS, logits=True) for p in run.prompts]
    while engine.busy:
        group.options = OPTIONS._replace(chunk=int(rng.integers(1, OPTIONS.chunk + 1)))
        engine.step()
    found = golden.compare(run, requests)
    assert found.right, found
    assert 0.2 < engine.stats.accepted / engine.stats.drafts < 0.8
    assert set(map(len, engine.programs)) == {1, 2}  # ragged steps, and steps that decode


@both_formats
def test_requests_behind_shared_prefixes_give_the_golden_tokens(run, engine):
    engine.groups[0].draft = golden.spoilt_drafts(run, np.random.default_rng(2))
    engine.generate(run.prompts, 1)
    first = engine.submit(run.prompts[1], golden.NEW_TOKENS, logits=True)
    engine.step(), engine.step()
    rest = [engine.submit(run.prompts[i], golden.NEW_TOKENS, logits=True) for i in (1, 2)]
    engine.step()
    tables = engine.groups[0].pages.tables()
    pages = [table[[r.slot for r in (first, rest[0])], 0].tolist() for table in tables]
    assert pages[3][0] == pages[3][1] >= 0  # the same page of records
    for _ in engine.run():
        pass
    assert [r.reused for r in (first, *rest)] == [128, 128, 128]
    found = golden.compare(run, [first, *rest], (1, 1, 2))
    assert found.right, found


@both_formats
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_records_are_the_golden_ones(right, run, engine):
    engine.groups[0].draft = golden.spoilt_drafts(run, np.random.default_rng(0), right)
    assert golden.compare_records(run, engine) < golden.MAX_RECORDS_ERROR


def test_a_batch_gives_each_of_20_prompts_what_it_gets_alone(cpu_engine):
    rng = np.random.default_rng(3)
    prompts = prompts_of(rng, rng.integers(1, 180, size=20))
    alone = [cpu_engine.generate([prompt], 24, logits=True)[0] for prompt in prompts]
    cpu_engine.drop_prefixes()
    cpu_engine.groups[0].draft = look_up
    together = cpu_engine.generate(prompts, 24)
    assert cpu_engine.stats.drafts > 0
    for one, other in zip(alone, together, strict=True):
        for i, (a, b) in enumerate(zip(one.output, other.output, strict=True)):
            if a != b:
                assert gaps(one.logits[i]) < MARGIN
                break  # what follows is another text
    same = sum(one.output == other.output for one, other in zip(alone, together, strict=True))
    assert same >= 19, same
    for request in alone[:4]:
        assert_greedy(request, whole_of(jax.config.jax_default_device))


# --- Records in other formats -----------------------------------------------------------------


def forced(config, params, sequences, **options):
    """Logits of the last positions of sequences."""
    whole = Whole(config, params, **options)
    return np.stack([whole(sequence) for sequence in sequences])


def assert_close(got, want, typical, largest):
    """Errors of positions' logits are within these; no token differs whose margin is larger."""
    errors = np.abs(got - want).max(-1)
    margins = gaps(want)[got.argmax(-1) != want.argmax(-1)]
    print(
        f"error of a position's logits: median {np.median(errors):.2g}, largest "
        f"{errors.max():.2g}; {margins.size} of {errors.size} tokens differ, whose margins are up "
        f"to {margins.max(initial=0):.2g}"
    )
    assert 1e-4 < np.median(errors) < typical and errors.max() < largest
    assert margins.max(initial=0) < errors.max()
    assert margins.size < 0.1 * errors.size


# The largest errors are of the indexer: a score that moves past its cut changes which records are
# attended to.
@pytest.mark.parametrize("formats, typical", [("bf16", 0.01), ("fp8_block128", 0.1)])
def test_quantised_records_move_no_token_whose_margin_is_larger(formats, typical, run, on_device):
    sequences = [p + t[:-1] for p, t in zip(run.prompts, run.tokens, strict=True)]
    want = np.stack([whole_of(on_device)(sequence) for sequence in sequences])
    got = forced(*tiny(on_device), sequences, record_formats=(formats, formats))
    assert_close(got, want, typical, 5)


def test_records_of_flash_move_no_token_whose_margin_is_larger(on_device):
    every_record = CAPACITY // CSA
    config = dataclasses.replace(measure.TINY, head_dim=512, index_topk=every_record)
    params = make_random(config, max_len=512, dtype=jnp.float32)
    sequences = prompts_of(np.random.default_rng(4), [CAPACITY] * 3)
    want = forced(config, params, sequences)
    got = forced(config, params, sequences, record_formats=("fp8_ds_mla", "fp8_block128"))
    assert_close(got, want, 0.1, 0.5)


# --- Requests that wait, leave, and have odd lengths ------------------------------------------


@pytest.mark.parametrize("length", [1, 4, 128])
def test_prompts_of_one_token_and_of_whole_windows(length, cpu_engine):
    prompts = prompts_of(np.random.default_rng(length), [length] * 3)
    for _ in range(2):  # the second time behind a cached prefix, where there is one
        requests = cpu_engine.generate(prompts, 9)
        for request in requests:
            assert_greedy(request, whole_of(jax.config.jax_default_device))
    assert not any(request.reused for request in requests)  # of 128 tokens, the last is needed


def test_a_prompt_of_5000_tokens():
    config = measure.TINY
    params = make_random(config, max_len=5120, dtype=jnp.float32)
    (prompt,) = prompts_of(np.random.default_rng(5), [5000])
    engine = Engine(config, params, Options(batch=1, max_len=5120, chunk=512))
    (request,) = engine.generate([prompt], 4)
    assert engine.stats.prompt_tokens == 5000
    assert_greedy(request, Whole(config, params, 4, 5004, Sizes(128, 8, 40, 640, 640, 40)))
    engine.drop_prefixes()
    assert engine.pages_in_use() == 0


@contextlib.contextmanager
def occupied(engine, tokens):
    """Others have pages of so many tokens each; no more prefixes are cached than there is room."""
    (group,), last = engine.groups, OPTIONS.batch + OPTIONS.prefixes - 1
    engine.drop_prefixes()
    group.options = OPTIONS._replace(prefixes=OPTIONS.prefixes - len(tokens))
    for i, n in enumerate(tokens):
        group.pages.hold(last - i, 0, n, decodes=False)
    yield
    for i in range(len(tokens)):
        group.pages.release(last - i)


def engine_without_model(options):
    """An engine whose every token is 0: for tests of who runs, and of who has which pages."""
    with jax.default_device(cpu := jax.devices("cpu")[0]):
        engine = Engine(*tiny(cpu), options)
    shape = options.batch, options.next_n
    engine.execute = lambda batch: (np.zeros(shape, np.int32), None)
    return engine


@pytest.mark.parametrize("max_len, page_tokens", [(130, 128), (300, 256)])
def test_the_pools_hold_a_batch_of_the_longest_requests(max_len, page_tokens):
    options = Options(max_len=max_len, page_tokens=page_tokens, resume_every=page_tokens)
    assert options.sizes().record_pages == options.batch * 2
    engine = engine_without_model(options)
    prompts = prompts_of(np.random.default_rng(11), [max_len - 10] * options.batch)
    for request in engine.generate(prompts, 10):
        assert request.status == "finished" and request.preempted == 0


def test_prompts_that_run_do_not_evict_each_others_prefixes_at_every_step():
    engine = engine_without_model(Options(batch=4, chunk=512, prefixes=2))
    popular, *others = prompts_of(np.random.default_rng(10), [129] * 4)
    running = [engine.submit(prompt, 60) for prompt in others]  # more than there are prefixes
    engine.step()
    reused = []
    for _ in range(3):
        request = engine.submit(popular, 5)
        while not request.done:
            engine.step()
        reused.append(request.reused)
        engine.step()  # the others go on
    assert reused == [0, 128, 128]
    assert {request.status for request in running} == {"running"}


def test_where_pages_run_out_requests_wait_and_none_is_wrong(cpu_engine):
    (group,), running = cpu_engine.groups, []
    prompts = prompts_of(np.random.default_rng(6), [100, 110, 120, 90, 200])
    with occupied(cpu_engine, [512, 512]):  # 4 of 12 pages of records are left, of 128 tokens each
        requests = [cpu_engine.submit(prompt, 60) for prompt in prompts]
        while cpu_engine.busy:
            cpu_engine.step()
            running.append(len(group.running))
    assert max(running) == 3 and sum(request.preempted for request in requests) > 0
    for request in requests:
        assert_greedy(request, whole_of(jax.config.jax_default_device))


@pytest.mark.parametrize("chunk, pool_tokens", [(512, 512), (64, 640)])
def test_reused_says_what_the_last_admission_found(chunk, pool_tokens):
    """First a prefix is found but no pages; or it is found, and gone when the request is back."""
    engine = engine_without_model(Options(batch=2, chunk=chunk, pool_tokens=pool_tokens))
    prefix, other, end = prompts_of(np.random.default_rng(12), [128, 300, 200])
    engine.generate([[*prefix, 1]], 1)
    first, second = engine.submit(other, 200), engine.submit(prefix + end, 150)
    while not second.preempted and second.status != "finished":
        assert second.reused == 128 * (chunk == 64 and second.status == "running")
        engine.step()
    for _ in engine.run():
        pass
    assert [request.status for request in (first, second)] == ["finished"] * 2
    assert (second.preempted, second.reused) == (chunk == 64, 0)


def test_a_request_larger_than_the_pools_fails_and_no_other_one_does(cpu_engine):
    lengths = [50, 250, 300, 60]
    prompts = prompts_of(np.random.default_rng(7), lengths)
    with occupied(cpu_engine, [512, 512, 200]):  # 2 pages are left
        small, grows, large, other = requests = [cpu_engine.submit(prompt, 9) for prompt in prompts]
        for _ in cpu_engine.run():
            pass
    for request in (grows, large):
        assert request.status == "failed" and request.slot is None
        assert re.match("larger than the pools: window: slot .* are free", request.error)
    assert len(grows.output) < 9 and not large.output
    for request in (small, other):
        assert_greedy(request, whole_of(jax.config.jax_default_device))
    assert all(request.done for request in requests)


def test_where_drafts_have_no_pages_a_request_goes_on_without_them():
    engine = engine_without_model(Options(batch=1, prefixes=0, drafts=3, pool_tokens=128))
    engine.groups[0].draft = lambda tokens, most: [1] * most  # never what comes
    (request,) = engine.generate([[2] * 100], 60)
    assert request.status == "failed" and request.preempted == 0
    assert (request.length, len(request.tokens)) == (128, 129)  # all that the page has room for


@pytest.mark.parametrize("place", range(4))
def test_where_pages_are_missing_the_pool_is_named(place):
    pages = Pages(Options())
    pool, name = pages.all[place], Tables._fields[place]
    assert name in ("window", "csa", "hca", "records")
    pool._free.clear()
    with pytest.raises(OutOfPages, match=f"^{name}: slot 0 needs .* are free$"):
        pages.hold(0, 0, 8, decodes=True)


def test_a_request_may_be_cancelled_at_any_time(cpu_engine):
    prompts = prompts_of(np.random.default_rng(8), [150, 70, 30, 20])
    in_chunk, between, stays, waits = requests = [cpu_engine.submit(p, 9) for p in prompts]
    held, batch = cpu_engine.plan()
    assert in_chunk.length == 0 and len(held[0][0].tokens) == 64  # a chunk of its prompt
    result = cpu_engine.execute(batch)
    cpu_engine.cancel(in_chunk)  # while the device works on the chunk
    cpu_engine.cancel(waits)
    cpu_engine.settle(held, *result)
    cpu_engine.step()
    assert 0 < between.length < between.prompt
    cpu_engine.cancel(between)
    again, decoding = cpu_engine.submit(prompts[0], 9), cpu_engine.submit(prompts[3], 9)
    while not decoding.output:
        cpu_engine.step()
    held, batch = cpu_engine.plan()
    assert decoding in [part.request for part in held[0]]
    output, result = decoding.output, cpu_engine.execute(batch)
    cpu_engine.cancel(decoding)  # a step that would have given it a token
    assert decoding not in cpu_engine.settle(held, *result) and decoding.output == output
    for _ in cpu_engine.run():
        pass
    for request in (in_chunk, between, waits, decoding):
        assert request.status == "cancelled" and request.slot is None
    assert not any(request.output for request in requests if request is not stays)
    for request in (stays, again):
        assert_greedy(request, whole_of(jax.config.jax_default_device))


def test_a_request_ends_with_the_token_that_says_so(run, cpu_engine):
    eos = run.tokens[0][5]
    cpu_engine.groups[0].options = OPTIONS._replace(eos=eos)
    cpu_engine.groups[0].draft = golden.spoilt_drafts(run, np.random.default_rng(0), right=1.0)
    (request,) = cpu_engine.generate(run.prompts[:1], 50)
    assert request.output == run.tokens[0][: run.tokens[0].index(eos) + 1]


def test_requests_that_cannot_be_served_are_refused(cpu_engine):
    for prompt, max_tokens, text in (
        ([], 1, "prompt: expected at least one token, got none"),
        ([3, 256], 1, r"prompt: expected tokens in 0\.\.\.255, got 256"),
        ([3, -1], 1, r"prompt: expected tokens in 0\.\.\.255, got -1"),
        ([3], 0, "max_tokens: expected at least 1, got 0"),
        ([3] * 500, 13, r"prompt: expected at most 512 tokens .*, got 500 \+ 13"),
    ):
        with pytest.raises(ValueError, match=text):
            cpu_engine.submit(prompt, max_tokens)
    for wrong in (2.5, np.float32(2), float("nan"), "2", None):
        text = re.escape(f": expected an integer, got {wrong!r}")
        with pytest.raises(TypeError, match=f"^prompt{text}$"):
            cpu_engine.submit([3, wrong], 1)
        with pytest.raises(TypeError, match=f"^max_tokens{text}$"):
            cpu_engine.submit([3], wrong)
    config, params = cpu_engine.config, cpu_engine.params
    for options, text in (
        (Options(max_len=513), "max_len: expected at most 512, .* got 513"),
        (Options(page_tokens=64), "page_tokens, resume_every: .* got 64 and 128"),
        (Options(resume_every=192), "page_tokens, resume_every: .* got 128 and 192"),
    ):
        with pytest.raises(ValueError, match=text):
            Engine(config, params, options)
    for name, least in LEAST.items():
        with pytest.raises(
            ValueError, match=f"^{name}: expected at least {least}, got {least - 1}"
        ):
            Engine(config, params, Options(**{name: least - 1}))
        with pytest.raises(TypeError, match=f"^{name}: expected an integer, got 2.5"):
            Engine(config, params, Options(**{name: 2.5}))
    with pytest.raises(ValueError, match=r"^groups: expected at least 1, got 0"):
        Engine(config, params, groups=0)


def test_numpys_integers_are_integers_that_do_not_wrap_around():
    engine = engine_without_model(Options(max_len=300))
    request = engine.submit(np.arange(200, dtype=np.uint8), np.uint8(60))
    assert {type(x) for x in (*request.tokens, request.max_tokens)} == {int}
    with pytest.raises(ValueError, match=r"at most 300 tokens .*, got 200 \+ 200"):
        engine.submit([1] * 200, np.uint8(200))
    for _ in engine.run():
        pass
    assert request.status == "finished" and len(request.output) == 60


# --- Programs ---------------------------------------------------------------------------------


def pools_of(caches):
    return {x.shape for x in jax.tree.leaves(caches)}


def assert_updates_in_place(program, caches):
    """Every array of the caches is donated and comes back where it was; none is copied."""
    text, leaves = program.as_text(), jax.tree.leaves(caches)
    aliases = re.search(r"input_output_alias=\{(.*?) \}, ", text)[1]
    assert aliases.count("may-alias") + aliases.count("must-alias") >= len(leaves)
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* (?:copy|copy-start)\(", text)
    copied = {tuple(map(int, dims.split(","))) for dims in copied if dims}
    assert copied and not copied & pools_of(caches)


@both_formats
def test_no_step_copies_a_pool(engine):
    engine.warm_up()
    assert set(engine.programs) == {(3, 1), (3, 4), (76,)}
    for program in engine.programs.values():
        assert_updates_in_place(program, engine.caches)


def test_two_devices_give_the_golden_tokens(run):
    engine = Engine(
        *tiny(jax.devices("cpu")[0]),
        OPTIONS._replace(batch=2, pool_tokens=1536),
        draft=golden.spoilt_drafts(run, np.random.default_rng(9)),
        groups=2,
    )
    requests = engine.generate(run.prompts, golden.NEW_TOKENS, logits=True)
    found = golden.compare(run, requests)
    assert found.right, found
    assert [len(group.prefixes) for group in engine.groups] == [1, 1]  # both have worked
    collective = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
    of_a_device = jax.tree.map(lambda x: x.addressable_data(0)[0], engine.caches)
    for program in engine.programs.values():
        assert not collective.search(program.as_text())
        assert_updates_in_place(program, of_a_device)
    engine.drop_prefixes()
    assert engine.pages_in_use() == 0


# --- Weights ----------------------------------------------------------------------------------

# As in DeepSeek's checkpoints, written out: what weights.RENAMES must undo.
DEEPSEEK_NAMES = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.compressor.kv_proj.weight": "attn.compressor.wkv.weight",
    "self_attn.compressor.gate_proj.weight": "attn.compressor.wgate.weight",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_norm.weight": "attn.compressor.norm.weight",
    "self_attn.compressor.indexer.kv_proj.weight": "attn.indexer.compressor.wkv.weight",
    "self_attn.compressor.indexer.gate_proj.weight": "attn.indexer.compressor.wgate.weight",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_norm.weight": "attn.indexer.compressor.norm.weight",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
}


def read_tiny():
    """Weights under transformers' names, and the configuration."""
    with np.load(TINY) as file:
        meta = json.loads(bytes(file["meta"]))
        weights = {}
        for key, (exponent, offset) in meta["exponent_offset"].items():
            value = file[f"w.{key}"]
            weights[key.removeprefix("model.")] = (
                value.astype(np.int64)
                if key.endswith("tid2eid")
                else (offset + value * 2.0**exponent).astype(np.float32)
            )
    return weights, meta["config"] | {"model_type": "deepseek_v4"}


def split_experts(weights):
    """As on disk: each expert's three products apart, in DeepSeek's names."""
    named = {}
    for name, value in weights.items():
        layer, end = re.match(r"(layers\.\d+\.)?(.*)", name).groups(default="")
        if end == "mlp.experts.gate_up_proj":
            for e, both in enumerate(value):
                for part, half in zip(("w1", "w3"), np.split(both, 2), strict=True):
                    named[f"{layer}ffn.experts.{e}.{part}.weight"] = half.copy()
        elif end == "mlp.experts.down_proj":
            for e, down in enumerate(value):
                named[f"{layer}ffn.experts.{e}.w2.weight"] = down.copy()
        else:
            named[layer + DEEPSEEK_NAMES.get(end, end)] = value
    return named


def save(folder, weights, config):
    numpy = pytest.importorskip("safetensors.numpy")
    names = sorted(weights)
    for i, part in enumerate((names[::2], names[1::2])):
        numpy.save_file({n: weights[n] for n in part}, folder / f"model-{i}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("names", ["transformers", "deepseek"])
def test_a_checkpoint_is_read(names, tmp_path):
    weights, hf = read_tiny()
    if names == "deepseek":
        weights = split_experts(weights) | {"mtp.0.norm.weight": np.ones(3, np.float32)}
    else:
        weights = {n if n.startswith("lm") else f"model.{n}": w for n, w in weights.items()}
        kinds = {0: "sliding", 4: "compressed_sparse", 128: "heavily_compressed"}
        hf["layer_types"] = [f"{kinds[ratio]}_attention" for ratio in hf.pop("compress_ratios")]
        hf["mlp_layer_types"] = ["hash_moe"] * hf.pop("num_hash_layers") + ["moe"] * 3
    folder = save(tmp_path, weights, hf)
    config, params = load_checkpoint(folder, max_len=64, dtype=jnp.float32)
    want_config, want = load_tiny(max_len=64)
    assert config == want_config
    jax.tree.map(np.testing.assert_array_equal, params, want)
    params = load_checkpoint(folder, max_len=64)[1]
    assert params["lm_head.weight"].dtype == jnp.bfloat16


def test_a_checkpoint_that_is_none_is_refused(tmp_path, monkeypatch):
    weights, hf = read_tiny()
    weights = split_experts(weights)

    def load(weights=weights, config=hf):
        for file in tmp_path.iterdir():
            file.unlink()
        return load_checkpoint(save(tmp_path, weights, config), max_len=64)

    with pytest.raises(ValueError, match="expected model_type 'deepseek_v4', got 'llama'"):
        load(config=hf | {"model_type": "llama"})
    with pytest.raises(ValueError, match="expected layer_types or compress_ratios, got neither"):
        load(config={k: v for k, v in hf.items() if k != "compress_ratios"})
    for field, entries in (
        ("layer_types", ["sliding_attention", "heavily_compressed_attention"] * 2),
        ("compress_ratios", hf["compress_ratios"]),
    ):
        text = f"config.json: {field}: expected num_hidden_layers = 4 entries, got 3"
        with pytest.raises(ValueError, match=text):
            load(config=hf | {field: entries[:3]})
        text = f"config.json: {field}: expected one of .*, got 'full_attention'"
        with pytest.raises(ValueError, match=text):
            load(config=hf | {field: [*entries[:3], "full_attention"]})
    some = {n: w for n, w in weights.items() if not n.endswith("wq_a.weight")}
    with pytest.raises(KeyError, match=r"no weight layers\.0\.self_attn\.q_a_proj\.weight"):
        load(some)
    with pytest.raises(
        ValueError, match=r"head\.weight: expected shape \[256, 64\], got \[2, 64\]"
    ):
        load(weights | {"head.weight": weights["head.weight"][:2]})
    with pytest.raises(ValueError, match="expected weights in floating point, got quantised"):
        load(weights | {"layers.0.attn.wq_a.scale": np.ones(1, np.float32)})
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected \*.safetensors, found none"):
        load_checkpoint(tmp_path, max_len=64)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="needs the package safetensors: pip install"):
        load_checkpoint(tmp_path, max_len=64)


def test_random_weights_have_the_shapes_of_the_small_model():
    weights, _ = read_tiny()
    config, _ = load_tiny(max_len=8)
    assert {n: w.shape for n, w in weights.items()} == list_shapes(config)
    assert sum(w.size for w in weights.values()) == 616_119


# --- The command ------------------------------------------------------------------------------


def test_the_command_streams_tokens_and_writes_a_profile_that_names_our_calls(
    run, tmp_path, capsys
):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(" ".join(map(str, prompt)) for prompt in run.prompts[:2]) + "\n")
    arguments = ["--prompts", str(file), "--max-tokens", "5", "--trace", str(tmp_path / "profile")]
    assert command_line.main([*arguments, "--batch", "2", "--chunk", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    streamed = collections.defaultdict(list)
    for line in lines:
        if found := re.fullmatch(r"(\d): ([\d ]+)", line):
            streamed[int(found[1])] += map(int, found[2].split())
    assert streamed == {i: run.tokens[i][:5] for i in range(2)}
    text = "\n".join(lines)
    assert re.search(r"prefill: \d+ tokens/s", text) and re.search(r"decode: \d+ tokens/s", text)
    assert re.search(r"time to first token: median \d", text)
    assert re.search(r"decode_2x1: a step \d+ us; compressors .* in 3 calls, -?[\d.]+% of it", text)
    path = lines[-1].removeprefix("profile: ")
    events = json.loads(gzip.decompress(pathlib.Path(path).read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    for call in ("decode_records", "ragged_records"):
        assert {f"jax_dsv4.{call} (layer {i})" for i in (1, 2, 3)} <= names


@pytest.mark.parametrize(
    "arguments, text",
    [
        ("--max-len 64", "--max-len: expected more than --max-tokens = 64, got 64"),
        ("--prompt-tokens 0", "--prompt-tokens: expected at least 1, got 0"),
        ("--max-tokens 0", "--max-tokens: expected at least 1, got 0"),
        ("--batch 0", "--batch: expected at least 1, got 0"),
        ("--chunk 0", "--chunk: expected at least 1, got 0"),
        ("--drafts -1", "--drafts: expected at least 0, got -1"),
        ("--groups 0", "--groups: expected at least 1, got 0"),
        ("--chunk few", "--chunk: invalid integer value: 'few'"),
    ],
)
def test_the_command_names_a_wrong_argument(arguments, text, capsys):
    with pytest.raises(SystemExit) as info:
        command_line.main(arguments.split())
    assert info.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: argument {text}\n")


def test_requests_of_the_command_do_not_wait_for_the_compiler(tmp_path, monkeypatch):
    ready, seen = [], []
    monkeypatch.setattr(Engine, "warm_up", lambda engine: ready.append(time.perf_counter()))
    monkeypatch.setattr(command_line, "report", lambda engine, requests: seen.extend(requests))
    (file := tmp_path / "prompts.txt").write_text("1 2\n3\n")
    assert command_line.main(["--prompts", str(file), "--max-tokens", "1", "--quiet"]) == 0
    assert [request.prompt for request in seen] == [2, 1]
    assert all(request.arrival > ready[0] for request in seen)


@pytest.mark.parametrize(
    "lines, text",
    [
        ("1 2\n\n1 300", ", after 1 prompts: prompt: expected tokens in 0...255, got 300"),
        ("1 " * 500, ", after 0 prompts: prompt: expected at most 512 tokens (max_len)"),
        ("1 two", ", after 0 prompts: invalid literal for int() with base 10: 'two'"),
        (None, "No such file or directory"),
    ],
)
def test_the_command_names_what_is_wrong_with_its_prompts(lines, text, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    if lines is not None:
        file.write_text(lines)
    assert command_line.main(["--prompts", str(file)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: --prompts {file}, after ") and text in err and not out


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--groups", "1000"], "groups: expected at most"),
        (["--records", "fp8_ds_mla", "fp8"], "record_formats: "),
        (["--checkpoint", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_the_command_names_a_wrong_option(arguments, text, capsys):
    assert command_line.main([*arguments, "--max-tokens", "1"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and text in err and not out


def test_a_folder_for_a_profile_that_cannot_be_made_is_known_before_the_run(capsys):
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(["--trace", "/dev/null/profile"])
    assert exit_info.value.code == 2
    assert "argument --trace: " in capsys.readouterr().err


@pytest.mark.parametrize("max_len", [2, 20])
def test_a_profile_has_requests_no_longer_than_the_longest(max_len, tmp_path):
    engine = engine_without_model(Options(max_len=max_len))
    assert measure.write_trace(engine, str(tmp_path)).exists()
    assert engine.stats.steps > 0


def test_the_benchmark_runs(capsys, monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    assert command_line.main(["--bench"]) == 0
    text = capsys.readouterr().out
    for name in ("decode, B = 2", "a chunk of 64 after 64"):
        for kind in ("compressors", "compressors in jitted jnp"):
            cost = rf"{kind} -?[\d.]+ us \(-?[\d.]+ to -?[\d.]+\) in 2 calls, -?[\d.]+% of it"
            assert re.search(rf"{name}: a step \d+ us; {cost}", text)


def test_the_distribution_has_no_example():
    files = importlib.metadata.files("jax_dsv4") or []
    assert files and not [file for file in files if file.parts[0] == "examples"]
