"""Search for candidates, selection among them, and attention in rows that have too many."""

# Arguments of kernels have no Python types, and capitals are constants of compilation:
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# mypy: disable-error-code="import-not-found, import-untyped"
# ruff: noqa: N803

import triton
import triton.language as tl

from separata_shared.attention.topk.triton_kernels.scores import (
    INT_MIN,
    LOWEST,
    compute_scores,
    dot,
    dropout_factor,
    end_of_keys,
    float_at,
    gather,
    keeps,
    kth_largest,
    load_rows,
    load_top_k,
    locate_rows,
    locate_tile,
    missing_scale,
    store_rows,
)


@triton.jit
def _store_limits(limits, rows, threshold, highest, total, last, size, inside):
    tl.store(limits.threshold + rows, threshold, mask=inside)
    tl.store(limits.highest + rows, highest, mask=inside)
    tl.store(limits.total + rows, total, mask=inside)
    tl.store(limits.last + rows, last, mask=inside)
    tl.store(limits.size + rows, size, mask=inside)


@triton.jit
def search_kernel(
    problem,
    candidates,  # (R, CAPACITY): bits of the score, then the key; of equals lower keys first
    counts,  # listed scores (R,); above CAPACITY the list is not complete
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DEPTH: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """List the scores from a lower bound of the k-th largest upwards, for each row.

    Keys whose index leaves the same remainder form one of N groups. The k-th largest of the
    DEPTH largest scores of all groups is at most the k-th largest score.
    """
    tile, batch, head = locate_tile(tl.cdiv(problem.T, M), problem)
    rows = tile * M + tl.arange(0, M)
    stop = end_of_keys(problem, tl.minimum(tile * M + M, problem.T), CAUSAL)
    q = load_rows(problem.query, batch, head, rows, problem.T, D, BLOCK_D)

    first = tl.full([M, N], float("-inf"), tl.float32)
    second, third, fourth = first, first, first
    for start in range(0, stop, N):
        columns = start + tl.arange(0, N)
        scores = compute_scores(problem, q, batch, head, rows, columns, CAUSAL, D)
        first, scores = tl.maximum(first, scores), tl.minimum(first, scores)
        if DEPTH > 1:
            second, scores = tl.maximum(second, scores), tl.minimum(second, scores)
        if DEPTH > 2:
            third, scores = tl.maximum(third, scores), tl.minimum(third, scores)
            fourth = tl.maximum(fourth, scores)
    if DEPTH > 1:
        first = tl.reshape(tl.join(first, second), [M, 2 * N])
    if DEPTH > 2:
        first = tl.reshape(
            tl.join(first, tl.reshape(tl.join(third, fourth), [M, 2 * N])), [M, 4 * N]
        )

    inside = rows < problem.T
    bound = kth_largest(first, load_top_k(problem, batch, head, rows, inside), 15)
    bound = tl.where(inside, bound, float("inf"))
    row = (batch * problem.H + head) * problem.T + tile * M
    lists = candidates + row.to(tl.int64) * CAPACITY + tl.arange(0, M) * CAPACITY
    count = tl.zeros([M], tl.int32)
    for start in range(0, stop, N):
        columns = start + tl.arange(0, N)
        scores = compute_scores(problem, q, batch, head, rows, columns, CAUSAL, D)
        best = tl.max(scores, 1)
        if tl.max((best >= bound).to(tl.int32)) > 0:
            # Reductions over columns are cheap, a scatter is not: each turn takes the largest score
            # of every row, the lowest key among equals. The condition above saves nothing but lets
            # the compiler load keys ahead, which it does not around a loop.
            while tl.max((best >= bound).to(tl.int32)) > 0:
                found = tl.min(tl.where(scores == best[:, None], columns[None, :], problem.S), 1)
                packed = (best.to(tl.int32, bitcast=True).to(tl.int64) << 32) | found
                new = best >= bound
                tl.store(lists + count, packed, mask=new & (count < CAPACITY))
                count += new.to(tl.int32)
                scores = tl.where(columns[None, :] == found[:, None], float("-inf"), scores)
                best = tl.max(scores, 1)
    tl.store(counts + row + tl.arange(0, M), count, mask=inside)


@triton.jit
def _load_candidates(candidates, rows, slots, count, CAPACITY: tl.constexpr):
    """Scores, ``-inf`` outside, and keys, each ``(rows, slots)``."""
    inside = slots[None, :] < count[:, None]
    address = candidates + rows.to(tl.int64)[:, None] * CAPACITY + slots[None, :]
    packed = tl.load(address, mask=inside, other=0)
    scores = (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(inside, scores, float("-inf")), packed.to(tl.int32)


@triton.jit
def select_kernel(
    problem,
    candidates,  # (R, CAPACITY) of the search
    counts,  # (R,) of the search; rows whose list is not complete are left alone
    dropout,
    output,  # (R, D_V)
    columns,  # kept keys (R, SLOTS); not written where there are more
    weights,  # their weights (R, SLOTS)
    limits,
    R,  # number of rows
    EXACT: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAPACITY: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    C: tl.constexpr,
):
    """Select among the candidates, list what is kept, and sum the values."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    batch, head, time = locate_rows(problem, rows)
    count = tl.load(counts + rows, mask=rows < R, other=CAPACITY + 1)
    complete = count <= CAPACITY
    count = tl.where(complete, count, 0)
    scores, keys = _load_candidates(candidates, rows, tl.arange(0, CAPACITY), count, CAPACITY)

    k = load_top_k(problem, batch, head, time, complete)
    threshold = kth_largest(scores, k, 31)
    last = tl.full([BLOCK_R], 2**31 - 1, tl.int32)
    if EXACT:
        above = tl.sum((scores > threshold[:, None]).to(tl.int32), 1)
        equal = scores == threshold[:, None]
        first = tl.cumsum(equal.to(tl.int32), 1) <= (k - above)[:, None]
        last = tl.max(tl.where(equal & first, keys, -1), 1)
    kept = keeps(scores, keys, threshold, last)
    highest, size = tl.max(scores, 1), tl.sum(kept.to(tl.int32), 1)
    highest = tl.where(size > 0, highest, 0.0)
    unit = missing_scale(problem)
    weight = tl.where(kept, tl.exp((scores - highest[:, None]) * unit), 0.0)
    total = tl.maximum(tl.sum(weight, 1), 1e-30)  # of a row without keys

    listed = size <= SLOTS
    place = tl.cumsum(kept.to(tl.int32), 1) - 1
    address = rows.to(tl.int64)[:, None] * SLOTS + place
    inside = kept & (listed & complete)[:, None]
    tl.store(columns + address, keys, mask=inside)
    tl.store(weights + address, weight / total[:, None], mask=inside)
    size = tl.where(listed, size, -1)
    _store_limits(limits, rows, threshold, highest, total, last, size, complete)

    # The lists are read again, a few keys at a time, because a row of values is wide.
    result = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in range(0, tl.max(count), C):
        slots = start + tl.arange(0, C)
        score, key = _load_candidates(candidates, rows, slots, count, CAPACITY)
        keep = keeps(score, key, threshold, last)
        share = tl.exp((score - highest[:, None]) * unit) / total[:, None]
        if dropout.seed is not None:
            share *= dropout_factor(dropout, rows[:, None], key)
        kv_head = (head // problem.repeats)[:, None]
        v = gather(problem.value, batch[:, None], kv_head, key, keep, D_V, BLOCK_V)
        result += tl.sum(tl.where(keep, share, 0.0)[:, :, None] * v, 1)
    store_rows(output, rows, result, complete, D_V)


@triton.jit
def _count_from(
    problem,
    q,
    batch,
    head,
    rows,
    stop,
    bound,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Number of scores from ``bound`` upwards, for each row."""
    count = tl.zeros(rows.shape, tl.int32)
    for start in range(0, stop, N):
        scores = compute_scores(problem, q, batch, head, rows, start + tl.arange(0, N), CAUSAL, D)
        count += tl.sum((scores >= bound[:, None]).to(tl.int32), 1)
    return count


@triton.jit
def dense_kernel(
    problem,
    counts,  # (R,) of the search
    dropout,
    output,  # (R, D_V)
    limits,
    EXACT: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Attend in the rows whose candidates are too many, without a list.

    The k-th largest score is found bit by bit, each of which takes the scores of all keys.
    """
    tile, batch, head = locate_tile(tl.cdiv(problem.T, M), problem)
    rows = tile * M + tl.arange(0, M)
    inside = rows < problem.T
    row = (batch * problem.H + head) * problem.T + rows
    wide = tl.load(counts + row, mask=inside, other=0) > CAPACITY
    if tl.max(wide.to(tl.int32)) > 0:
        stop = end_of_keys(problem, tl.minimum(tile * M + M, problem.T), CAUSAL)
        q = load_rows(problem.query, batch, head, rows, problem.T, D, BLOCK_D)
        k = load_top_k(problem, batch, head, rows, inside)
        bound = tl.zeros([M], tl.float32)
        count = _count_from(problem, q, batch, head, rows, stop, bound, CAUSAL, D, N)
        place = tl.where(count >= k, 0, INT_MIN)
        for step in range(31):
            trial = place | (1 << (30 - step))
            bound = float_at(trial)
            count = _count_from(problem, q, batch, head, rows, stop, bound, CAUSAL, D, N)
            place = tl.where(count >= k, trial, place)
        place = tl.maximum(place, LOWEST)
        threshold = float_at(place)
        bound = float_at(place + 1)
        above = _count_from(problem, q, batch, head, rows, stop, bound, CAUSAL, D, N)

        highest = tl.full([M], float("-inf"), tl.float32)
        last = tl.full([M], -1 if EXACT else 2**31 - 1, tl.int32)
        ties = tl.zeros([M], tl.int32)
        for start in range(0, stop, N):
            columns = start + tl.arange(0, N)
            scores = compute_scores(problem, q, batch, head, rows, columns, CAUSAL, D)
            highest = tl.maximum(highest, tl.max(scores, 1))
            if EXACT:
                equal = scores == threshold[:, None]
                number = ties[:, None] + tl.cumsum(equal.to(tl.int32), 1)
                kept = equal & (number <= (k - above)[:, None])
                last = tl.maximum(last, tl.max(tl.where(kept, columns[None, :], -1), 1))
                ties += tl.sum(equal.to(tl.int32), 1)
        highest = tl.where(highest > float("-inf"), highest, 0.0)

        total = tl.zeros([M], tl.float32)
        result = tl.zeros([M, BLOCK_V], tl.float32)
        for start in range(0, stop, N):
            columns = start + tl.arange(0, N)
            scores = compute_scores(problem, q, batch, head, rows, columns, CAUSAL, D)
            kept = keeps(scores, columns[None, :], threshold, last)
            weight = tl.exp((scores - highest[:, None]) * missing_scale(problem))
            weight = tl.where(kept, weight, 0.0)
            total += tl.sum(weight, 1)
            if dropout.seed is not None:
                weight *= dropout_factor(dropout, row[:, None], columns[None, :])
            kv_head = head // problem.repeats
            v = load_rows(problem.value, batch, kv_head, columns, problem.S, D_V, BLOCK_V)
            result += dot(weight.to(v.dtype), v)
        total = tl.maximum(total, 1e-30)
        store_rows(output, row, result / total[:, None], wide, D_V)
        size = tl.full([M], -1, tl.int32)
        _store_limits(limits, row, threshold, highest, total, last, size, wide)
