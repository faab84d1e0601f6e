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
