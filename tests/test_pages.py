"""Which pages a step needs, and who owns them."""

import functools
import itertools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_dsv4 import (
    OutOfPages,
    PagePool,
    _config,
    init_state,
    live_pages,
    paged_kv_compress,
    pages_needed,
    slot_tables,
)
from jax_dsv4.reference.ragged import is_stored

FORMATS = ("raw", "prefix")
PAGE_SIZES, NEXT_NS = (1, 2, 3, 4, 6, 12, 32, 33, 100, 128), (1, 2, 5, 130)

RATIOS = (2, 3, 4, 128)

every_window = pytest.mark.parametrize(
    ("ratio", "overlap"), list(itertools.product(RATIOS, (False, True)))
)
every_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(autouse=True)
def more_ratios_than_are_compiled(monkeypatch):
    monkeypatch.setattr(_config, "RATIOS", RATIOS)


@functools.cache
def live_at_every_alignment(page_size, ratio, overlap, next_n, format):
    """Windows and pages, without the first windows and with them."""
    options = {"compress_ratio": ratio, "overlap": overlap, "next_n": next_n, "format": format}
    lengths = range(math.lcm(ratio, page_size) + 2 * ratio)
    return [live_pages(length, page_size, **options) for length in lengths]


# ------------------------------------------------------------------------------ pages of one step


@pytest.mark.parametrize(
    ("page_size", "ratio", "next_n", "raw", "prefix"),
    [
        (32, 128, 1, 4, 2),
        (32, 128, 4, 5, 2),
        (4, 128, 4, 33, 2),
        (1, 128, 1, 128, 2),
        (128, 128, 1, 1, 1),
        (32, 4, 4, 2, 2),
        (4, 4, 4, 3, 3),
        (1, 4, 1, 8, 3),
    ],
)
def test_prefixes_need_fewer_pages(page_size, ratio, next_n, raw, prefix):
    """``test_main.py`` has runs with no more pages than these, and NaN in all others."""
    for format, want in (("raw", raw), ("prefix", prefix)):
        options = {"compress_ratio": ratio, "next_n": next_n, "format": format}
        assert pages_needed(page_size, **options) == want
        live = [live_pages(length, page_size, **options) for length in range(4 * ratio * page_size)]
        assert max(map(len, live)) == want
        for length, pages in enumerate(live):
            written = range(length // page_size, (length + next_n - 1) // page_size + 1)
            assert pages == sorted(set(pages)) and set(written) <= set(pages)


def rows_read_by(ratio, overlap, format):
    return functools.partial(oracle.rows_read, ratio=ratio, overlap=overlap, state_format=format)


def rows_stored(size, length, *, max_rewind, **rule):
    """Of so many rows, those before ``length`` that a call stores; ``max_rewind``: None for all."""
    rows = np.arange(size, dtype=np.int32)
    stored = is_stored(rows, length, max_rewind=-1 if max_rewind is None else max_rewind, **rule)
    return rows[(rows < length) & np.asarray(stored)]


@every_window
@every_format
def test_live_pages_are_those_of_rows_that_this_step_or_a_later_one_reads(ratio, overlap, format):
    options = {"compress_ratio": ratio, "overlap": overlap, "format": format}
    rows_read = rows_read_by(ratio, overlap, format)
    for page_size, next_n in itertools.product((1, 3, 32), (1, 5)):
        for window, by in itertools.product((1, 2, 3, 1000), (-2, -1, 0, 1, 2, ratio // 2)):
            length = window * ratio + by
            later = range(length, length + ratio + 2)
            read = {row for start in later for row in rows_read(start)}
            rows = {row for row in read if row < length} | set(range(length, length + next_n))
            want = sorted({row // page_size for row in rows})
            assert live_pages(length, page_size, next_n=next_n, **options) == want


@every_window
@every_format
@pytest.mark.parametrize("every", (None, 1, 12, 96, 128, 200))
def test_live_pages_are_those_of_live_rows(ratio, overlap, format, every):
    """Of old ones that this step or one that resumes reads, and of new ones that are stored."""
    options = {"compress_ratio": ratio, "overlap": overlap, "format": format}
    rule = {"ratio": ratio, "overlap": overlap, "state_format": format}
    rows_read = rows_read_by(ratio, overlap, format)
    starts = {window * ratio + by for window in (1, 2, 3) for by in (-2, -1, 0, 1, ratio // 2)}
    steps = itertools.product({0, *starts}, (1, 2, 5, 2 * ratio + 3))
    for (length, next_n), rewind in itertools.product(steps, (0, 1, 4, 150)):
        end = length + next_n
        multiples = [start for start in range(1, end + 1) if every and start % every == 0]
        stored = rows_stored(6 * ratio + 9, end, max_rewind=rewind, resume_every=every or 0, **rule)
        old = {row for m in multiples for row in rows_read(m)} | rows_read(length)
        rows = {row for row in old if row < length} | set(stored[stored >= length].tolist())
        later = [*multiples, *range(max(end - rewind, length), end + ratio + 2)]
        assert {row for start in later for row in rows_read(start) if row < end} <= rows
        for page_size in (1, 2, 3, 32):
            want = sorted({row // page_size for row in rows})
            live = {"max_rewind": rewind, "resume_every": every}
            assert live_pages(length, page_size, next_n=next_n, **options, **live) == want
            if every is None:
                most = [pages_needed(page_size, next_n=n, **options) for n in (1, rewind or 1)]
                assert len(want) <= sum(most)
            # All new rows stored: at once, and row by row.
            want = sorted({row // page_size for row in {*old, *range(length, end)}})
            all_rows = {"resume_every": every}
            assert live_pages(length, page_size, next_n=next_n, **options, **all_rows) == want


@every_window
@every_format
def test_pages_needed_is_the_most_that_are_live_at_any_alignment(ratio, overlap, format):
    for page_size, next_n in itertools.product(PAGE_SIZES, NEXT_NS):
        live = live_at_every_alignment(page_size, ratio, overlap, next_n, format)
        options = {"compress_ratio": ratio, "overlap": overlap, "next_n": next_n}
        assert pages_needed(page_size, **options, format=format) == max(map(len, live))


@every_window
@every_format
@pytest.mark.parametrize("page_size", (16383, 999_999, 1_000_000))
def test_pages_needed_takes_no_time_for_large_pages(ratio, overlap, format, page_size):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        options = {"compress_ratio": ratio, "overlap": overlap, "next_n": 4, "format": format}
        assert pages_needed(page_size, **options) == 2
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


@pytest.mark.parametrize("helper", (live_pages, pages_needed, slot_tables))
def test_overlap_is_the_ratios_by_default(helper):
    sizes = {live_pages: (131,), slot_tables: (2, 300)}.get(helper, ())
    for ratio in RATIOS:
        options = {"page_size": 1, "compress_ratio": ratio, "next_n": 2}
        default, same = helper(*sizes, **options), helper(*sizes, **options, overlap=ratio == 4)
        other = helper(*sizes, **options, overlap=ratio != 4)
        assert str(default) == str(same) != str(other)


@pytest.mark.parametrize(
    ("name", "value"),
    [("length", -1), ("page_size", 0), ("next_n", 0), ("compress_ratio", 5), ("format", "both")],
)
def test_page_counts_name_a_wrong_argument(name, value):
    good = {"length": 3, "page_size": 8, "next_n": 1, "compress_ratio": 4, "format": "raw"}
    arguments = good | {name: value}
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        live_pages(**arguments)
    arguments.pop("length")
    if name != "length":
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            pages_needed(**arguments)


def make_pool(num_pages=8, batch=3, max_pages=9, **options):
    return PagePool(num_pages, batch, max_pages, **{"page_size": 4, "compress_ratio": 4} | options)


GOOD = {"page_size": 8, "compress_ratio": 4, "overlap": True, "format": "raw"}
LIVE = {"max_rewind": 3, "resume_every": 5}
HELPERS = {
    live_pages: GOOD | {"length": 3, "next_n": 1} | LIVE,
    pages_needed: GOOD | {"next_n": 1},
    slot_tables: GOOD | {"slots": 2, "max_len": 9, "next_n": 1},
    PagePool: GOOD | {"num_pages": 3, "batch": 2, "max_pages": 9, "resume_every": 8},
    PagePool.hold: {"self": make_pool(), "slot": 0, "length": 3, "next_n": 1, "max_rewind": 0},
    PagePool.release: {"self": make_pool(), "slot": 0},
}


@pytest.mark.parametrize(
    ("helper", "name"),
    [(helper, name) for helper, good in HELPERS.items() for name in good if name != "self"],
    ids=lambda x: getattr(x, "__qualname__", x),
)
def test_every_argument_is_checked(helper, name):
    good, errors = HELPERS[helper], (TypeError, ValueError)
    if name == "format":
        wrong = [("both", ValueError), (None, ValueError)]
    elif name == "overlap":
        wrong = [(1, TypeError), ("no", TypeError)]
    elif name == "compress_ratio":
        wrong = [(5, ValueError), (4.0, ValueError), (jnp.int32(4), TypeError)]
    else:
        wrong = [(-1, ValueError), (2**31, ValueError), (1.5, TypeError), ("1", TypeError)]
        wrong += [(jnp.int32(1), TypeError)]
        wrong += [(None, TypeError)] if name not in LIVE else []
    for value, error in wrong:
        with pytest.raises(errors, match=f"^{name}: expected ") as info:
            helper(**good | {name: value})
        assert info.type is error


@pytest.mark.parametrize("helper", HELPERS, ids=lambda helper: helper.__qualname__)
def test_numpys_integers_are_integers(helper):
    good = HELPERS[helper]
    numpys = {k: np.uint32(v) if type(v) is int else v for k, v in good.items()}
    numpys |= {"overlap": np.bool_(True)} if "overlap" in good else {}
    want, got = helper(**good), helper(**numpys)
    if helper is PagePool:
        want, got = want.tables, got.tables
    assert str(got) == str(want)


def test_lengths_of_unsigned_integers_do_not_wrap_around():
    for format in FORMATS:
        options = {"compress_ratio": 4, "next_n": np.uint8(4), "format": format}
        assert live_pages(np.uint32(0), np.uint8(2), **options) == [0, 1]
        assert live_pages(np.int32(2**31 - 1), 1, **options)[-1] == 2**31 + 2


# ------------------------------------------------------------------------------- a pool of pages


def check_owners(pool):
    """Each page has one owner or is free."""
    tables = pool.tables
    owned = tables[tables >= 0].tolist()
    assert len(set(owned)) == len(owned) == pool.num_pages - pool.num_free
    assert set(owned) <= set(range(pool.num_pages))


@every_window
@every_format
@pytest.mark.parametrize(("page_size", "next_n"), [(1, 4), (3, 1), (8, 130), (32, 4), (300, 7)])
def test_a_slot_owns_its_live_pages_and_keeps_them_from_step_to_step(
    ratio, overlap, format, page_size, next_n
):
    """With ``pages_needed`` pages per slot, which never run out."""
    options = {"compress_ratio": ratio, "overlap": overlap, "format": format}
    batch, max_len = 3, 4 * ratio + 9
    num_pages = batch * pages_needed(page_size, next_n=next_n, **options)
    max_pages = -(-(max_len + next_n) // page_size)
    pool = PagePool(num_pages, batch, max_pages, page_size=page_size, **options)
    assert (pool.num_pages, pool.batch, pool.max_pages) == (num_pages, batch, max_pages)
    assert (pool.page_size, pool.format) == (page_size, format)
    rng = np.random.default_rng(0)
    lengths, live = [None] * batch, [[]] * batch
    for _ in range(150):
        for slot in range(batch):
            before = pool.tables[slot]
            if lengths[slot] is None or lengths[slot] > max_len:
                pool.release(slot)
                lengths[slot], live[slot] = int(rng.integers(ratio)), []
                assert np.all(pool.tables[slot] == -1)
                before = pool.tables[slot]
            n = int(rng.integers(1, next_n + 1))
            live[slot] = live_pages(lengths[slot], page_size, next_n=n, **options)
            pool.hold(slot, lengths[slot], n)
            table = pool.tables[slot]
            assert np.flatnonzero(table >= 0).tolist() == live[slot]
            kept = (before >= 0) & (table >= 0)
            np.testing.assert_array_equal(table[kept], before[kept])
            lengths[slot] += int(rng.integers(1, n + 1))
        check_owners(pool)
    for slot in range(batch):
        pool.release(slot)
        pool.release(slot)  # of no pages: nothing to do
    assert pool.num_free == num_pages
    assert np.all(pool.tables == -1)


def test_out_of_pages_says_how_many_and_leaves_the_pool_unchanged():
    pool = make_pool(num_pages=6)
    pool.hold(0, 6, 3)
    pool.hold(1, 4, 8)
    before, num_free = pool.tables, pool.num_free
    assert [np.flatnonzero(row >= 0).tolist() for row in before] == [[0, 1, 2], [0, 1, 2], []]
    with pytest.raises(OutOfPages, match=r"^slot 2 needs 1 pages and has 0 of them; 0 of 6 are"):
        pool.hold(2, 0, 1)
    # Page 0 would be given back for page 3, but there is none for page 4.
    with pytest.raises(OutOfPages, match=r"^slot 1 needs 4 pages and has 2 of them; 1 of 6 are"):
        pool.hold(1, 8, 12)
    assert issubclass(OutOfPages, RuntimeError)
    np.testing.assert_array_equal(pool.tables, before)
    assert pool.num_free == num_free == 0
    pool.release(0)
    pool.hold(1, 8, 12)
    check_owners(pool)
    assert pool.tables[1].tolist() == [-1, *before[1, 1:3], *before[0, :2]] + [-1] * 4


def test_pages_given_back_serve_the_same_call():
    pool = make_pool(num_pages=3)
    pool.hold(0, 4, 8)
    before = pool.tables[0]
    pool.hold(0, 8, 8)
    assert pool.tables[0].tolist() == [-1, *before[1:3], before[0]] + [-1] * 5


def test_a_step_past_the_table_is_refused_and_leaves_the_pool_unchanged():
    pool = make_pool(max_pages=4)
    pool.hold(0, 12, 4)
    before = pool.tables
    message = r"^length: expected length \+ next_n of at most max_pages \* page_size = 16, got 12"
    with pytest.raises(ValueError, match=message):
        pool.hold(0, 12, 5)
    np.testing.assert_array_equal(pool.tables, before)
    assert pool.num_free == 8 - 2


def test_a_shorter_length_is_refused_until_the_slot_is_released():
    """A next request in a slot that holds pages of another one would write to them."""
    pool = make_pool(resume_every=8)
    pool.hold(0, 16, 5)
    pool.hold(0, 17, 5)  # of those rows all but one were rejected
    pool.hold(0, 17, 1)
    pool.share(1, 0, 16)
    before, num_free = pool.tables, pool.num_free
    for slot, length, least in ((0, 0, 17), (0, 16, 17), (1, 15, 16)):
        message = rf"^length: expected at least {least}, .* got {length}: release the slot before"
        with pytest.raises(ValueError, match=message):
            pool.hold(slot, length, 1)
    np.testing.assert_array_equal(pool.tables, before)
    assert pool.num_free == num_free
    pool.release(0)
    pool.hold(0, 0, 8)
    pool.hold(1, 16, 1)
    own, other = (set(table[table >= 0].tolist()) for table in pool.tables[:2])
    assert own and other and not own & other


def test_tables_given_away_do_not_change_with_the_pool_nor_the_pool_with_them():
    pool = make_pool()
    pool.hold(0, 0, 1)
    given = pool.tables
    assert given.dtype == np.int32
    assert given.shape == (3, 9)
    expected = given.copy()
    pool.release(0)
    np.testing.assert_array_equal(given, expected)
    given[:] = 5
    assert np.all(pool.tables == -1)


# -------------------------------------------------------------------------- pages that are shared


@every_window
@every_format
@pytest.mark.parametrize(("page_size", "times"), [(1, 5), (4, 32), (32, 1)])
def test_shared_pages_hold_what_their_requests_need_and_are_free_after_the_last(
    ratio, overlap, format, page_size, times
):
    """Pages of numbered rows, with nothing on those that are free."""
    every, batch = times * page_size, 5
    max_len = 2 * max(every, ratio) + 40
    most = max_len // 4
    rows_read = rows_read_by(ratio, overlap, format)
    rule = {"ratio": ratio, "overlap": overlap, "state_format": format, "resume_every": every}
    options = {"compress_ratio": ratio, "overlap": overlap, "format": format}
    max_pages = -(-(max_len + most) // page_size)
    pool = PagePool(
        batch * max_pages, batch, max_pages, page_size=page_size, resume_every=every, **options
    )
    rng, numbers = np.random.default_rng(0), itertools.count()
    state = np.full((pool.num_pages, page_size), -1)
    texts = [[] for _ in range(batch)]  # of each slot, the numbers of its tokens
    num_shared = 0
    for _ in range(400):
        slot = int(rng.integers(batch))
        if len(texts[slot]) > max_len or rng.random() < 0.05:
            pool.release(slot)
            texts[slot] = []
        if not texts[slot] and rng.random() < 0.8:
            source = int(rng.integers(batch))
            longest = min(len(texts[source]), max_len)
            length = int(rng.integers(longest // every + 1)) * every
            if length:
                pool.share(slot, source, length)
                texts[slot] = texts[source][:length]
                num_shared += 1
        text = texts[slot]
        start, n = len(text), int(rng.integers(1, most + 1))
        rewind = int(rng.integers(n)) if rng.random() < 0.7 else None
        pool.hold(slot, start, n, rewind)
        tables = pool.tables
        used = set(tables[tables >= 0].tolist())
        assert len(used) == pool.num_pages - pool.num_free
        state[list(set(range(pool.num_pages)) - used)] = -1
        for row in rows_read(start):
            assert state[tables[slot, row // page_size], row % page_size] == text[row]
        text += [next(numbers) for _ in range(n)]
        stored = rows_stored(max_len + most, start + n, max_rewind=rewind, **rule)
        for row in stored[stored >= start].tolist():
            assert tables[slot, row // page_size] >= 0
            state[tables[slot, row // page_size], row % page_size] = text[row]
        del text[start + n - int(rng.integers((n - 1 if rewind is None else rewind) + 1)) :]
    assert num_shared > 5
    for slot in range(batch):
        pool.release(slot)
    assert pool.num_free == pool.num_pages
    assert np.all(pool.tables == -1)


def test_pages_that_another_slot_shares_are_not_free_for_a_step():
    pool = make_pool(num_pages=4, resume_every=8)
    pool.hold(0, 0, 9)
    pool.share(1, 0, 8)
    assert pool.tables[:2].tolist() == [[0, 1, 2] + [-1] * 6, [-1, 1] + [-1] * 7]
    pool.hold(0, 9, 8)  # pages 1, for the multiple 8, 2, 3 and 4: page 0 is free again
    with pytest.raises(OutOfPages, match=r"^slot 1 needs 2 pages and has 1 of them; 0 of 4 are"):
        pool.hold(1, 8, 1)
    pool.release(0)
    assert pool.num_free == 3
    pool.hold(1, 8, 1)
    assert pool.tables[1, 1] == 1
    pool.release(1)
    assert pool.num_free == 4


def test_shared_pages_stay_with_a_step_that_is_held_again_with_fewer_rows():
    pool = make_pool(num_pages=3, resume_every=8)
    pool.hold(0, 0, 8)
    pool.share(1, 0, 8)
    shared = pool.tables[1, 1]
    pool.hold(0, 0, 4)
    pool.hold(0, 4, 4)  # its last rows go to the page that the other slot will read
    assert pool.tables[0, 1] == pool.tables[1, 1] == shared >= 0
    before = pool.tables
    with pytest.raises(OutOfPages, match=r"^slot 0 needs 4 pages and has 2 of them; 1 of 3 are"):
        pool.hold(0, 4, 12)
    np.testing.assert_array_equal(pool.tables, before)
    pool.release(0)
    pool.release(1)
    assert pool.num_free == 3


def test_a_slot_without_live_pages_can_be_resumed():
    """Nothing is read before the start of a disjoint window; its prefix is of no page."""
    pool = make_pool(compress_ratio=128, resume_every=128, max_pages=40)
    pool.hold(0, 0, 130, max_rewind=0)
    assert np.flatnonzero(pool.tables[0] >= 0).tolist() == [32]
    pool.share(1, 0, 128)
    assert np.all(pool.tables[1] == -1)
    pool.hold(1, 128, 1)
    assert pool.num_free == 8 - 2


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"slot": 3}, ValueError, "slot: expected "),
        ({"slot": 1.0}, TypeError, "slot: expected "),
        ({"slot": 0}, ValueError, "slot: expected one without a request, got 0: release it first"),
        ({"slot": 2}, ValueError, "slot: expected one without a request, got 2: release it first"),
        ({"source": -1}, ValueError, "source: expected "),
        ({"source": 1}, ValueError, "length: expected at most the 0 tokens of slot 1, got 8"),
        ({"length": 0}, ValueError, "length: expected "),
        ({"length": None}, TypeError, "length: expected "),
        ({"length": 12}, ValueError, "length: expected a multiple of resume_every = 8, got 12"),
        ({"length": 24}, ValueError, "length: expected at most the 17 tokens of slot 0, got 24"),
    ],
)
def test_share_names_a_wrong_argument_and_leaves_the_pool_unchanged(wrong, error, message):
    pool = make_pool(resume_every=8)
    pool.hold(0, 12, 5)
    pool.share(2, 0, 8)
    before, num_free = pool.tables, pool.num_free
    with pytest.raises(error, match=f"^{message}"):
        pool.share(**{"slot": 1, "source": 0, "length": 8} | wrong)
    np.testing.assert_array_equal(pool.tables, before)
    assert pool.num_free == num_free


def test_only_whole_pages_are_shared():
    with pytest.raises(ValueError, match=r"^resume_every: expected a multiple of page_size = 4"):
        make_pool(resume_every=6)
    pool = make_pool()
    pool.hold(0, 0, 8)
    with pytest.raises(ValueError, match=r"^length: expected a multiple of resume_every = None"):
        pool.share(1, 0, 8)


# ---------------------------------------------------------------------------------- rings of pages


@every_window
@every_format
def test_no_two_live_pages_of_a_step_share_a_page_of_the_ring(ratio, overlap, format):
    """Nor has any slot a page of another; and a ring of one page less would not do."""
    for page_size, next_n in itertools.product(PAGE_SIZES, NEXT_NS):
        live = live_at_every_alignment(page_size, ratio, overlap, next_n, format)
        max_len = (live[-1][-1] + 1) * page_size
        options = {"compress_ratio": ratio, "overlap": overlap, "next_n": next_n}
        got = slot_tables(2, max_len, page_size, **options, format=format)
        assert got.tables.dtype == np.int32
        assert got.tables.shape == (2, max_len // page_size)
        ring = got.num_pages // 2
        assert set(got.tables[0]) == set(range(ring))
        np.testing.assert_array_equal(got.tables[1], got.tables[0] + ring)
        for pages in live:
            assert len(set(got.tables[0, pages])) == len(pages)
        assert max(pages[-1] - pages[0] + 1 for pages in live) == ring


def test_a_ring_is_no_longer_than_the_table():
    got = slot_tables(3, 5, 4, compress_ratio=128, next_n=4)
    assert got.tables.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert got.num_pages == 6
    assert slot_tables(0, 5, 4, compress_ratio=128, next_n=4).tables.shape == (0, 2)


def test_more_pages_than_int32_has_are_refused():
    with pytest.raises(ValueError, match=r"^slots: expected at most 2\^31 - 1 pages, got "):
        slot_tables(2**29, 2**20, 1, compress_ratio=4, next_n=1)


@pytest.mark.parametrize("ratio", (4, 128))
@pytest.mark.parametrize("page_size", (1, 3, 32))
@every_format
def test_decoding_on_rings_changes_no_value(ratio, page_size, format):
    """Against a run in which no page is used twice. Rings of R or 2 R raw rows are too small."""
    head_dim, batch, next_n, max_len = 128, 3, 5, 3 * ratio + 40
    options = {"compress_ratio": ratio, "next_n": next_n, "format": format}
    rings = slot_tables(batch, max_len, page_size, **options)
    own = np.arange(rings.tables.size, dtype=np.int32).reshape(rings.tables.shape)
    rows = ratio * (1 + (ratio == 4))
    small = -(-rows // page_size)
    short = rings.tables[:, :1] + np.arange(own.shape[1], dtype=np.int32) % small
    runs = [(own, own.size), (rings.tables, rings.num_pages), (short, own.size)]

    @jax.jit
    def step(states, kv_score, kv_lens, q_lens):
        results = [
            paged_kv_compress(
                *(kv_score, None, state, tables, kv_lens),
                compress_ratio=ratio,
                q_lens=q_lens,
                out_dtype=jnp.float32,
            )
            for state, (tables, _) in zip(states, runs, strict=True)
        ]
        return [kv_comp for kv_comp, _ in results], [state for _, state in results]

    states = [
        init_state(n, page_size, head_dim=head_dim, compress_ratio=ratio, format=format)
        for _, n in runs
    ]
    rng = np.random.default_rng(0)
    lengths, differ, num_windows = np.zeros(batch, int), 0, 0
    state_dim = states[0].kv.shape[-1]
    while lengths.min() + next_n <= max_len:
        q_lens = np.minimum(rng.integers(1, next_n + 1, batch), max_len - lengths)
        kv_score = rng.standard_normal((batch, next_n, 2 * state_dim), np.float32)
        kv_lens = (lengths + q_lens).astype(np.int32)
        (want, got, wrong), states = step(states, kv_score, kv_lens, q_lens.astype(np.int32))
        np.testing.assert_array_equal(got, want)
        num_windows += int(np.any(np.asarray(want) != 0, axis=-1).sum())
        differ += int(np.any(np.asarray(wrong) != np.asarray(want)))
        lengths += rng.integers(np.minimum(q_lens, 1), q_lens + 1)  # the rest are rejected
    assert num_windows > 3
    if format == "raw":
        assert (differ > 0) == (small * page_size < rows + next_n - 1)
