"""The contract in float64 NumPy, one row and one window at a time: slow, and obvious."""

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)


def find_row(table, position, num_pages, page_size):
    """(page, slot) of ``position`` >= 0, or None for nowhere."""
    logical = position // page_size
    if logical >= len(table) or not 0 <= table[logical] < num_pages:
        return None
    return int(table[logical]), position % page_size


def paged_kv_compress(
    kv_score, ape, kv, score, kv_tables, score_tables, kv_lens, q_lens, *, ratio, overlap
):
    """One decode step -> (kv, score, kv_comp); the state rounded to its dtype, kv_comp in float64.

    ``kv`` and ``score`` are not modified.
    """
    kv, score = kv.copy(), score.copy()
    num_pages, page_size, state_dim = kv.shape
    batch, next_n, _ = kv_score.shape
    head_dim = state_dim // 2 if overlap else state_dim
    kv_comp = np.zeros((batch, -(-next_n // ratio), head_dim))
    where = (num_pages, page_size)

    spans = []
    for b in range(batch):
        length = int(kv_lens[b])
        n = next_n if q_lens is None else min(max(int(q_lens[b]), 0), next_n)
        if length <= 0 or n <= 0:
            continue
        spans.append((b, length, n))
        for t in range(n):
            position = length - n + t
            if position < 0:
                continue
            new_kv, new_score = np.split(kv_score[b, t].astype(np.float32), 2)
            if ape is not None:
                new_score = new_score + ape[position % ratio]  # in f32, like every sum here
            if (row := find_row(kv_tables[b], position, *where)) is not None:
                kv[row] = new_kv.astype(kv.dtype)
            if (row := find_row(score_tables[b], position, *where)) is not None:
                score[row] = new_score.astype(score.dtype)

    for b, length, n in spans:
        for m, window in enumerate(range(max(length - n, 0) // ratio, length // ratio)):
            rows = [(p, int(overlap)) for p in range(window * ratio, (window + 1) * ratio)]
            if overlap and window > 0:
                rows = [(p, 0) for p in range((window - 1) * ratio, window * ratio)] + rows
            scores, values = [], []
            for position, half in rows:
                at_kv = find_row(kv_tables[b], position, *where)
                at_score = find_row(score_tables[b], position, *where)
                if at_kv is None or at_score is None:
                    continue
                columns = slice(half * head_dim, (half + 1) * head_dim)
                scores.append(score[at_score][columns].astype(np.float64))
                values.append(kv[at_kv][columns].astype(np.float64))
            if scores:
                kv_comp[b, m] = softmax_mean(np.stack(scores), np.stack(values))
    return kv, score, kv_comp


def paged_kv_compress_on_prefixes(
    kv_score, ape, kv, score, kv_tables, score_tables, kv_lens, q_lens, *, ratio, overlap
):
    """The same on a state of prefixes: all three results in float64, but for the operands' rows."""
    new_kv, new_score = kv.astype(np.float64), score.astype(np.float64)
    num_pages, page_size, state_dim = kv.shape
    batch, next_n, _ = kv_score.shape
    head_dim = state_dim // 2 if overlap else state_dim
    kv_comp = np.zeros((batch, -(-next_n // ratio), head_dim))
    none = np.full(state_dim, -np.inf), np.zeros(state_dim)

    def places(b, position):
        where = (position, num_pages, page_size)
        return find_row(kv_tables[b], *where), find_row(score_tables[b], *where)

    for b in range(batch):
        length = int(kv_lens[b])
        n = next_n if q_lens is None else min(max(int(q_lens[b]), 0), next_n)
        if length <= 0 or n <= 0:
            continue
        start = max(length - n, 0)

        def stored(position, b=b):
            at_kv, at_score = places(b, position) if position >= 0 else (None, None)
            if at_kv is None or at_score is None:
                return none
            return score[at_score].astype(np.float64), kv[at_kv].astype(np.float64)

        rows, after = [stored(start - 1)], {}  # of the window so far; the prefix after each new row
        for position in range(start, length):
            at_kv, at_score = places(b, position)
            if position % ratio == 0:
                rows = [none]
            if at_kv is not None and at_score is not None:
                row = kv_score[b, position - length + n].astype(np.float32)
                bias = 0 if ape is None else ape[position % ratio]
                rows.append((row[state_dim:] + bias, row[:state_dim]))
            after[position] = merged(rows)
            if at_score is not None:
                new_score[at_score] = after[position][0]
            if at_kv is not None:
                new_kv[at_kv] = after[position][1]

        for m, window in enumerate(range(start // ratio, length // ratio)):
            last = (window + 1) * ratio - 1
            parts = [[x[-head_dim:] for x in after[last]]]
            if overlap:
                before = after.get(last - ratio) or stored(last - ratio)
                parts.append([x[:head_dim] for x in before])
            kv_comp[b, m] = merged(parts)[1]
    return new_kv, new_score, kv_comp


def merged(rows):
    """(logsumexp of the scores, softmax_mean) of rows (score, kv), each per column."""
    scores, values = (np.array(x, np.float64) for x in zip(*rows, strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        highest = scores.max(0)
        shift = np.where(highest == -np.inf, 0, highest)
        return shift + np.log(np.exp(scores - shift).sum(0)), softmax_mean(scores, values)


def softmax_mean(scores, values):
    """Per column, softmax(scores) . values over the rows; 0 where every score is -inf."""
    with np.errstate(invalid="ignore"):
        highest = scores.max(0)
        weights = np.exp(scores - np.where(highest == -np.inf, 0, highest))
        total = weights.sum(0)
        return np.where(total == 0, 0, (weights * values).sum(0) / np.where(total == 0, 1, total))


# -------------------------------------------------------------------------------- ragged batches


def ragged_requests(kv_lens, cu_q_lens, num_seqs, num_rows):
    """(request, its first new row, the row behind its last) of each that brings a row that counts.

    ``num_seqs``: None, or as the operand.
    """
    there = len(kv_lens) if num_seqs is None else min(max(int(num_seqs), 0), len(kv_lens))
    requests, end = [], min(max(int(cu_q_lens[0]), 0), num_rows)
    for b in range(there):
        begin, end = end, max(end, min(max(int(cu_q_lens[b + 1]), 0), num_rows))
        if begin < end and kv_lens[b] > 0:
            requests.append((b, begin, end))
    return requests


def rows_read(start, *, ratio, overlap, state_format):
    """The positions below ``start`` that a step which starts there may read, however long it is."""
    window = start // ratio
    before = {window * ratio - 1} if overlap and window else set()
    if state_format == "prefix":
        return before | ({start - 1} if start % ratio else set())
    first = window - 1 if overlap and window else window
    return set(range(first * ratio, start))


def rows_stored(start, length, store_rows, **kind):
    """Which of the new rows start <= position < length are: all (None), or (max_rewind, every)."""
    if store_rows is None:
        return set(range(start, length))
    max_rewind, every = store_rows
    starts = set(range(max(length - max_rewind, 0), length + 1))
    if every is not None:
        starts |= {s for s in range(start + 1, length + 1) if s % every == 0}
    return {p for s in starts for p in rows_read(s, **kind) if p >= start}


def ragged_kv_compress(
    kv_score,
    ape,
    kv,
    score,
    kv_tables,
    score_tables,
    kv_lens,
    cu_q_lens,
    num_seqs,
    *,
    ratio,
    overlap,
    state_format,
    store_rows=None,
):
    """A ragged batch, one request after the other: each a decode step on its rows, section 2.

    The decode step runs on a sequence of its own, of the rows from one window before the first that
    may be completed, in pages of one row. What of it is stored then goes where the tables say.
    """
    decode = {"raw": paged_kv_compress, "prefix": paged_kv_compress_on_prefixes}[state_format]
    new_dtype = kv.dtype if state_format == "raw" else np.float64
    states = {"kv": kv.astype(new_dtype), "score": score.astype(new_dtype)}
    num_pages, page_size, state_dim = kv.shape
    head_dim = state_dim // 2 if overlap else state_dim
    kv_comp = np.zeros((len(kv_score) // ratio + len(kv_lens), head_dim))
    for b, begin, end in ragged_requests(kv_lens, cu_q_lens, num_seqs, len(kv_score)):
        length = int(kv_lens[b])
        start = max(length - (end - begin), 0)
        origin = max(start // ratio - 1, 0) * ratio
        count = length - origin
        pools = {"kv": np.zeros((count, 1, state_dim), kv.dtype)}
        pools["score"] = np.full_like(pools["kv"], -np.inf)
        own_tables = {name: np.arange(count, dtype=np.int32)[None] for name in pools}
        places = {}
        for p in range(origin, length):
            where = (p, num_pages, page_size)
            places[p] = {"kv": find_row(kv_tables[b], *where)}
            places[p]["score"] = find_row(score_tables[b], *where)
            for name, at in places[p].items():
                if at is None and (p < start or store_rows is None):
                    own_tables[name][0, p - origin] = -1
                elif at is not None and p < start:
                    pools[name][p - origin, 0] = {"kv": kv, "score": score}[name][at]
        rows, lens = kv_score[None, begin:end], np.array([count], np.int32)
        kind = {"ratio": ratio, "overlap": overlap}
        *after, values = decode(
            rows, ape, *pools.values(), *own_tables.values(), lens, None, **kind
        )
        num_windows = length // ratio - start // ratio
        kv_comp[begin // ratio + b :][:num_windows] = values[0, :num_windows]
        for p in rows_stored(start, length, store_rows, state_format=state_format, **kind):
            for name, own in zip(states, after, strict=True):
                if places[p][name] is not None:
                    states[name][places[p][name]] = own[p - origin, 0]
    return states["kv"], states["score"], kv_comp
