"""Device code of ``triton.py``, which imports this module when it is first needed.

``R`` is the number of query rows ``B H T``, counted through in this order, ``L`` of keys
``B H_kv S``. Blocks are powers of two: ``M`` query rows by ``N`` keys where scores are products of
matrices, ``R`` rows by ``C`` listed keys where keys are gathered.
"""

# Arguments of kernels have no Python types, and capitals are constants of compilation:
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# ruff: noqa: N803, N806

from typing import Any, NamedTuple

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 as if it were integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
INT_MIN = tl.constexpr(-(2**31))
# The place of the lowest finite float, see `_place_of`.
LOWEST = tl.constexpr(-0x7F800000)


class Strided(NamedTuple):
    """A tensor of four dimensions; a stride of None repeats its dimension."""

    data: Any
    strides: Any


class Problem(NamedTuple):
    """What defines the scores."""

    query: Strided
    key: Strided
    value: Strided
    mask: Strided | None
    bias: Strided | None
    top_k: Strided  # (B, H, T), or a number with strides of None
    H: int
    repeats: int  # query heads for each key head
    T: int
    S: int
    scale: float


class Dropout(NamedTuple):
    """The factor of a weight is a function of the seed, the row and the key."""

    seed: Any  # None without dropout
    probability: float


class Limits(NamedTuple):
    """What decides whether a row keeps a key, and its weight; each ``(R,)``."""

    threshold: Any  # k-th largest score
    highest: Any  # largest score
    total: Any  # sum of exponentials
    last: Any  # last key kept among those with the k-th largest score
    size: Any  # listed keys; -1 for a row without a list


@triton.jit
def _head(x, batch, head):
    """Address of a head."""
    return x.data + batch.to(tl.int64) * x.strides[0] + head.to(tl.int64) * x.strides[1]


@triton.jit
def _load_rows(x, batch, head, rows, size, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a head, ``(rows, BLOCK)``, zero outside."""
    width = tl.arange(0, BLOCK)
    inside = (rows < size)[:, None]
    if WIDTH < BLOCK:
        inside = inside & (width < WIDTH)[None, :]
    place = rows.to(tl.int64)[:, None] * x.strides[2] + width[None, :] * x.strides[3]
    return tl.load(_head(x, batch, head) + place, mask=inside, other=0.0)


@triton.jit
def _gather(x, batch, head, rows, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``(R, C)`` of the heads ``(R, 1)`` or ``(R, C)``: float32 ``(R, C, BLOCK)``."""
    width = tl.arange(0, BLOCK)
    inside = inside[:, :, None]
    if WIDTH < BLOCK:
        inside = inside & (width < WIDTH)[None, None, :]
    start = _head(x, batch, head) + rows.to(tl.int64) * x.strides[2]
    place = start[:, :, None] + (width * x.strides[3])[None, None, :]
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_tile(x, batch, head, rows, columns, T, S):
    """Part of a mask or bias, ``(M, N)`` or ``(1, N)`` where it is the same in all rows."""
    inside = (columns < S)[None, :]
    place = columns.to(tl.int64)[None, :] * x.strides[3]
    if x.strides[2] is not None:
        inside = inside & (rows < T)[:, None]
        place = place + rows.to(tl.int64)[:, None] * x.strides[2]
    return tl.load(_head(x, batch, head) + place, mask=inside, other=0)


@triton.jit
def _dot(a, b):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tile(tiles, problem):
    """Tile of rows, batch element and head of this program; long causal rows come first."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    return tile, head // problem.H, head % problem.H


@triton.jit
def _row(problem, rows):
    """Batch element, head and time of rows that are counted through."""
    head = rows // problem.T
    return head // problem.H, head % problem.H, rows % problem.T


@triton.jit
def _row_k(problem, batch, head, time, inside):
    k = problem.top_k.data
    if problem.top_k.strides is not None:
        strides = problem.top_k.strides
        k = tl.load(
            k + batch * strides[0] + head * strides[1] + time * strides[2], mask=inside, other=1
        )
    return k


@triton.jit
def _stop(problem, rows_stop, CAUSAL: tl.constexpr):
    """The end of the keys that rows before ``rows_stop`` may attend."""
    stop = problem.S
    if CAUSAL:
        stop = tl.minimum(stop, rows_stop + problem.S - problem.T)
    return stop


@triton.jit
def _scores(problem, q, batch, head, rows, columns, CAUSAL: tl.constexpr, D: tl.constexpr):
    """Scores ``(M, N)``, ``-inf`` where a key is not allowed.

    Without a bias they still lack the scale, which does not matter for the selection. Every kernel
    computes a score by the same instructions, so that all find the same number.
    """
    T, S = problem.T, problem.S
    k = _load_rows(problem.key, batch, head // problem.repeats, columns, S, D, q.shape[1])
    scores = _dot(q, tl.trans(k))
    allowed = (columns < S)[None, :]
    if CAUSAL:
        allowed = allowed & (columns[None, :] <= rows[:, None] + (S - T))
    if problem.mask is not None:
        allowed = allowed & (_load_tile(problem.mask, batch, head, rows, columns, T, S) != 0)
    if problem.bias is not None:
        bias = _load_tile(problem.bias, batch, head, rows, columns, T, S)
        scores = scores * problem.scale + bias.to(tl.float32)
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def _unit(problem):
    """The factor that scores still lack."""
    if problem.bias is not None:
        return 1.0
    else:
        return problem.scale


@triton.jit
def _place_of(x):
    """The place of floats in the order of all floats, an integer."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _float_at(place):
    """The floats at these places."""
    return tl.where(place >= 0, place, place ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _kth_largest(x, k, BITS: tl.constexpr):
    """The k-th largest of each row of ``x``, exact for 31 bits, else a little lower.

    At least the lowest finite number, so that no ``-inf`` is as large.
    """
    places = _place_of(x)
    place = tl.where(tl.sum((places >= 0).to(tl.int32), 1) >= k, 0, INT_MIN)
    for step in range(BITS):
        trial = place | (1 << (30 - step))
        count = tl.sum((places >= trial[:, None]).to(tl.int32), 1)
        place = tl.where(count >= k, trial, place)
    return _float_at(tl.maximum(place, LOWEST))


@triton.jit
def _factor(dropout, rows, columns):
    """Factors that dropout gives to weights."""
    random, _, _, _ = tl.philox(tl.load(dropout.seed), columns, rows, columns * 0, columns * 0)
    kept = tl.uint_to_uniform_float(random) >= dropout.probability
    return tl.where(kept, 1.0 / (1.0 - dropout.probability), 0.0)


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
    candidates,
    counts,
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

    Args:
        problem: The scores.
        candidates: ``(R, CAPACITY)``: bits of the score above the key; equal scores in the order of keys.
        counts: Listed scores ``(R,)``; above CAPACITY the list is not complete.
    """
    tile, batch, head = _tile(tl.cdiv(problem.T, M), problem)
    rows = tile * M + tl.arange(0, M)
    stop = _stop(problem, tl.minimum(tile * M + M, problem.T), CAUSAL)
    q = _load_rows(problem.query, batch, head, rows, problem.T, D, BLOCK_D)

    first = tl.full([M, N], float("-inf"), tl.float32)
    second, third, fourth = first, first, first
    for start in range(0, stop, N):
        columns = start + tl.arange(0, N)
        scores = _scores(problem, q, batch, head, rows, columns, CAUSAL, D)
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
    bound = _kth_largest(first, _row_k(problem, batch, head, rows, inside), 15)
    bound = tl.where(inside, bound, float("inf"))
    row = (batch * problem.H + head) * problem.T + tile * M
    lists = candidates + row.to(tl.int64) * CAPACITY + tl.arange(0, M) * CAPACITY
    count = tl.zeros([M], tl.int32)
    for start in range(0, stop, N):
        columns = start + tl.arange(0, N)
        scores = _scores(problem, q, batch, head, rows, columns, CAUSAL, D)
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
    candidates,
    counts,
    dropout,
    output,
    columns,
    weights,
    limits,
    R,
    EXACT: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAPACITY: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    C: tl.constexpr,
):
    """Select among the candidates, list what is kept, and sum the values.

    Args:
        problem: The scores.
        candidates: ``(R, CAPACITY)`` of the search.
        counts: ``(R,)`` of the search; rows whose list is not complete are left alone.
        dropout: Dropout.
        output: ``(R, D_V)``.
        columns: Kept keys ``(R, SLOTS)``; not written where there are more.
        weights: Their weights ``(R, SLOTS)``.
        limits: Limits.
        R: Number of rows.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    batch, head, time = _row(problem, rows)
    count = tl.load(counts + rows, mask=rows < R, other=CAPACITY + 1)
    complete = count <= CAPACITY
    count = tl.where(complete, count, 0)
    scores, keys = _load_candidates(candidates, rows, tl.arange(0, CAPACITY), count, CAPACITY)

    k = _row_k(problem, batch, head, time, complete)
    threshold = _kth_largest(scores, k, 31)
    last = tl.full([BLOCK_R], 2**31 - 1, tl.int32)
    if EXACT:
        above = tl.sum((scores > threshold[:, None]).to(tl.int32), 1)
        equal = scores == threshold[:, None]
        first = tl.cumsum(equal.to(tl.int32), 1) <= (k - above)[:, None]
        last = tl.max(tl.where(equal & first, keys, -1), 1)
    kept = _keeps(scores, keys, threshold, last)
    highest, size = tl.max(scores, 1), tl.sum(kept.to(tl.int32), 1)
    highest = tl.where(size > 0, highest, 0.0)
    unit = _unit(problem)
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
        keep = _keeps(score, key, threshold, last)
        share = tl.exp((score - highest[:, None]) * unit) / total[:, None]
        if dropout.seed is not None:
            share *= _factor(dropout, rows[:, None], key)
        kv_head = (head // problem.repeats)[:, None]
        v = _gather(problem.value, batch[:, None], kv_head, key, keep, D_V, BLOCK_V)
        result += tl.sum(tl.where(keep, share, 0.0)[:, :, None] * v, 1)
    _store_rows(output, rows, result, complete, D_V)


@triton.jit
def _keeps(scores, keys, threshold, last):
    """Whether rows keep keys; both ``(rows, keys)``."""
    equal = (scores == threshold[:, None]) & (keys <= last[:, None])
    return (scores > threshold[:, None]) | equal


@triton.jit
def _store_rows(pointer, rows, x, inside, WIDTH: tl.constexpr):
    """Store rows of a contiguous tensor ``(R, WIDTH)``."""
    width = tl.arange(0, x.shape[1])
    place = rows.to(tl.int64)[:, None] * WIDTH + width[None, :]
    tl.store(pointer + place, x, mask=inside[:, None] & (width < WIDTH)[None, :])


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
        scores = _scores(problem, q, batch, head, rows, start + tl.arange(0, N), CAUSAL, D)
        count += tl.sum((scores >= bound[:, None]).to(tl.int32), 1)
    return count


@triton.jit
def dense_kernel(
    problem,
    counts,
    dropout,
    output,
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

    Args:
        problem: The scores.
        counts: ``(R,)`` of the search.
        dropout: Dropout.
        output: ``(R, D_V)``.
        limits: Limits.
    """
    tile, batch, head = _tile(tl.cdiv(problem.T, M), problem)
    rows = tile * M + tl.arange(0, M)
    inside = rows < problem.T
    row = (batch * problem.H + head) * problem.T + rows
    wide = tl.load(counts + row, mask=inside, other=0) > CAPACITY
    if tl.max(wide.to(tl.int32)) > 0:
        stop = _stop(problem, tl.minimum(tile * M + M, problem.T), CAUSAL)
        q = _load_rows(problem.query, batch, head, rows, problem.T, D, BLOCK_D)
        k = _row_k(problem, batch, head, rows, inside)
        bound = tl.zeros([M], tl.float32)
        count = _count_from(problem, q, batch, head, rows, stop, bound, CAUSAL, D, N)
        place = tl.where(count >= k, 0, INT_MIN)
        for step in range(31):
            trial = place | (1 << (30 - step))
            bound = _float_at(trial)
            count = _count_from(problem, q, batch, head, rows, stop, bound, CAUSAL, D, N)
            place = tl.where(count >= k, trial, place)
        place = tl.maximum(place, LOWEST)
        threshold = _float_at(place)
        bound = _float_at(place + 1)
        above = _count_from(problem, q, batch, head, rows, stop, bound, CAUSAL, D, N)

        highest = tl.full([M], float("-inf"), tl.float32)
        last = tl.full([M], -1 if EXACT else 2**31 - 1, tl.int32)
        ties = tl.zeros([M], tl.int32)
        for start in range(0, stop, N):
            columns = start + tl.arange(0, N)
            scores = _scores(problem, q, batch, head, rows, columns, CAUSAL, D)
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
            scores = _scores(problem, q, batch, head, rows, columns, CAUSAL, D)
            kept = _keeps(scores, columns[None, :], threshold, last)
            weight = tl.exp((scores - highest[:, None]) * _unit(problem))
            weight = tl.where(kept, weight, 0.0)
            total += tl.sum(weight, 1)
            if dropout.seed is not None:
                weight *= _factor(dropout, row[:, None], columns[None, :])
            kv_head = head // problem.repeats
            v = _load_rows(problem.value, batch, kv_head, columns, problem.S, D_V, BLOCK_V)
            result += _dot(weight.to(v.dtype), v)
        total = tl.maximum(total, 1e-30)
        _store_rows(output, row, result / total[:, None], wide, D_V)
        size = tl.full([M], -1, tl.int32)
        _store_limits(limits, row, threshold, highest, total, last, size, wide)


@triton.jit
def _entries(
    problem,
    g,
    columns,
    weights,
    dropout,
    rows,
    slots,
    size,
    D_V: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Listed keys, whether they exist, weights before and after dropout, gradients of the former.

    Each ``(rows, slots)``; ``g`` is the gradient of the output, ``(rows, BLOCK_V)``.
    """
    batch, head, _ = _row(problem, rows)
    inside = slots[None, :] < size[:, None]
    place = rows.to(tl.int64)[:, None] * SLOTS + slots[None, :]
    keys = tl.load(columns + place, mask=inside, other=0)
    weight = tl.load(weights + place, mask=inside, other=0.0)
    kv_head = (head // problem.repeats)[:, None]
    v = _gather(problem.value, batch[:, None], kv_head, keys, inside, D_V, g.shape[1])
    gradient = tl.sum(v * g[:, None, :], 2)
    used = weight
    if dropout.seed is not None:
        factor = _factor(dropout, rows[:, None], keys)
        used *= factor
        gradient *= factor
    return keys, inside, weight, used, gradient


@triton.jit
def lists_backward_kernel(
    problem,
    grad,
    columns,
    weights,
    dropout,
    limits,
    grad_query,
    grad_key,
    grad_value,
    grad_bias,
    grad_scores,
    R,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    C: tl.constexpr,
):
    """Gradients through the listed keys.

    Args:
        problem: The scores.
        grad: Gradient of the output.
        columns: Listed keys ``(R, SLOTS)``.
        weights: Their weights ``(R, SLOTS)``.
        dropout: Dropout.
        limits: Limits.
        grad_query: ``(R, D)``, written for rows with a list.
        grad_key: ``(L, D)``, added to unless ``grad_scores`` is given.
        grad_value: ``(L, D_V)``, likewise.
        grad_bias: Added to; or None.
        grad_scores: ``(R, SLOTS)``, written; or None.
        R: Number of rows.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    size = tl.load(limits.size + rows, mask=rows < R, other=-1)
    batch, head, time = _row(problem, rows)
    b, h, t = batch[:, None], head[:, None], time[:, None]
    every = (size >= 0)[:, None]
    g = tl.reshape(_gather(grad, b, h, t, every, D_V, BLOCK_V), [BLOCK_R, BLOCK_V])
    q = tl.reshape(_gather(problem.query, b, h, t, every, D, BLOCK_D), [BLOCK_R, BLOCK_D])

    mean = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, tl.max(size), C):
        slots = start + tl.arange(0, C)
        _, _, weight, _, gradient = _entries(
            problem, g, columns, weights, dropout, rows, slots, size, D_V, SLOTS
        )
        mean += tl.sum(weight * gradient, 1)

    result = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, tl.max(size), C):
        slots = start + tl.arange(0, C)
        keys, inside, weight, used, gradient = _entries(
            problem, g, columns, weights, dropout, rows, slots, size, D_V, SLOTS
        )
        gradient = weight * (gradient - mean[:, None])
        kv_head = h // problem.repeats
        k = _gather(problem.key, b, kv_head, keys, inside, D, BLOCK_D)
        result += tl.sum(gradient[:, :, None] * k, 1)
        if grad_scores is not None:
            place = rows.to(tl.int64)[:, None] * SLOTS + slots[None, :]
            tl.store(grad_scores + place, gradient, mask=inside)
        else:
            key = (b * (problem.H // problem.repeats) + kv_head) * problem.S + keys
            share = (gradient * problem.scale)[:, :, None] * q[:, None, :]
            _add_rows(grad_key, key, share, inside, D)
            _add_rows(grad_value, key, used[:, :, None] * g[:, None, :], inside, D_V)
        if grad_bias is not None:
            _add_bias(grad_bias, b, h, t, keys, gradient, inside)
    _store_rows(grad_query, rows, result * problem.scale, size >= 0, D)


@triton.jit
def _add_rows(pointer, rows, x, inside, WIDTH: tl.constexpr):
    """Add ``x`` ``(R, C, BLOCK)`` to the rows ``(R, C)`` of a contiguous tensor."""
    width = tl.arange(0, x.shape[2])[None, None, :]
    place = rows.to(tl.int64)[:, :, None] * WIDTH + width
    inside = inside[:, :, None] & (width < WIDTH)
    tl.atomic_add(pointer + place, x, mask=inside, sem="relaxed")


@triton.jit
def _add_bias(bias, batch, head, rows, columns, x, inside):
    """Add gradients of scores to that of the bias."""
    place = columns.to(tl.int64) * bias.strides[3]
    if bias.strides[2] is not None:
        place = place + rows.to(tl.int64) * bias.strides[2]
    tl.atomic_add(_head(bias, batch, head) + place, x, mask=inside, sem="relaxed")


@triton.jit
def keys_backward_kernel(
    problem,
    grad,
    weights,
    dropout,
    grad_scores,
    order,
    offsets,
    grad_key,
    grad_value,
    L,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    C: tl.constexpr,
):
    """Gradients of keys and values from the lists sorted by key: always summed in one order.

    Args:
        problem: The scores.
        grad: Gradient of the output.
        weights: ``(R, SLOTS)``.
        dropout: Dropout.
        grad_scores: ``(R, SLOTS)``.
        order: Places in the two above, those of one key after those of the last.
        offsets: Where keys begin in ``order``, ``(L + 1,)``.
        grad_key: ``(L, D)``, written.
        grad_value: ``(L, D_V)``, written.
        L: Number of keys.
    """
    keys = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.load(offsets + keys, mask=keys < L, other=0)
    end = tl.load(offsets + keys + 1, mask=keys < L, other=0)
    grad_k = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in range(0, tl.max(end - begin), C):
        place = begin[:, None] + start + tl.arange(0, C)[None, :]
        inside = place < end[:, None]
        entry = tl.load(order + place, mask=inside, other=0)
        rows = (entry // SLOTS).to(tl.int32)
        score = tl.load(grad_scores + entry, mask=inside, other=0.0)
        weight = tl.load(weights + entry, mask=inside, other=0.0)
        if dropout.seed is not None:
            weight *= _factor(dropout, rows, (keys % problem.S)[:, None] + rows * 0)
        batch, head, time = _row(problem, rows)
        q = _gather(problem.query, batch, head, time, inside, D, BLOCK_D)
        grad_k += tl.sum(score[:, :, None] * q, 1)
        g = _gather(grad, batch, head, time, inside, D_V, BLOCK_V)
        grad_v += tl.sum(weight[:, :, None] * g, 1)
    _store_rows(grad_key, keys, grad_k * problem.scale, keys < L, D)
    _store_rows(grad_value, keys, grad_v, keys < L, D_V)


@triton.jit
def _dense_weights(
    problem,
    limits,
    dropout,
    q,
    batch,
    head,
    rows,
    columns,
    wide,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
):
    """Weights ``(M, N)`` in rows without a list, zero in others, and factors of dropout."""
    row = (batch * problem.H + head) * problem.T + rows
    threshold = tl.load(limits.threshold + row, mask=wide, other=float("inf"))
    last = tl.load(limits.last + row, mask=wide, other=-1)
    highest = tl.load(limits.highest + row, mask=wide, other=0.0)
    total = tl.load(limits.total + row, mask=wide, other=1.0)
    scores = _scores(problem, q, batch, head, rows, columns, CAUSAL, D)
    kept = _keeps(scores, columns[None, :], threshold, last)
    weight = tl.exp((scores - highest[:, None]) * _unit(problem)) / total[:, None]
    factor = tl.full(scores.shape, 1.0, tl.float32)
    if dropout.seed is not None:
        factor = _factor(dropout, row[:, None], columns[None, :])
    return tl.where(kept, weight, 0.0), factor


@triton.jit
def dense_queries_backward_kernel(
    problem,
    grad,
    dropout,
    limits,
    grad_query,
    grad_bias,
    means,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradients of the queries without a list.

    Args:
        problem: The scores.
        grad: Gradient of the output.
        dropout: Dropout.
        limits: Limits.
        grad_query: ``(R, D)``, written for these rows.
        grad_bias: Added to; or None.
        means: Mean gradient of the weights ``(R,)``, written for these rows.
    """
    tile, batch, head = _tile(tl.cdiv(problem.T, M), problem)
    rows = tile * M + tl.arange(0, M)
    row = (batch * problem.H + head) * problem.T + rows
    wide = tl.load(limits.size + row, mask=rows < problem.T, other=0) < 0
    if tl.max(wide.to(tl.int32)) > 0:
        kv_head = head // problem.repeats
        stop = _stop(problem, tl.minimum(tile * M + M, problem.T), CAUSAL)
        q = _load_rows(problem.query, batch, head, rows, problem.T, D, BLOCK_D)
        g = _load_rows(grad, batch, head, rows, problem.T, D_V, BLOCK_V)
        mean = tl.zeros([M], tl.float32)
        for start in range(0, stop, N):
            columns = start + tl.arange(0, N)
            weight, factor = _dense_weights(
                problem, limits, dropout, q, batch, head, rows, columns, wide, CAUSAL, D
            )
            v = _load_rows(problem.value, batch, kv_head, columns, problem.S, D_V, BLOCK_V)
            mean += tl.sum(weight * factor * _dot(g.to(v.dtype), tl.trans(v)), 1)
        result = tl.zeros([M, BLOCK_D], tl.float32)
        for start in range(0, stop, N):
            columns = start + tl.arange(0, N)
            weight, factor = _dense_weights(
                problem, limits, dropout, q, batch, head, rows, columns, wide, CAUSAL, D
            )
            v = _load_rows(problem.value, batch, kv_head, columns, problem.S, D_V, BLOCK_V)
            gradient = factor * _dot(g.to(v.dtype), tl.trans(v))
            gradient = weight * (gradient - mean[:, None])
            k = _load_rows(problem.key, batch, kv_head, columns, problem.S, D, BLOCK_D)
            result += _dot(gradient.to(k.dtype), k)
            if grad_bias is not None:
                inside = weight > 0.0
                _add_bias(grad_bias, batch, head, rows[:, None], columns[None, :], gradient, inside)
        _store_rows(grad_query, row, result * problem.scale, wide, D)
        tl.store(means + row, mean, mask=wide)


@triton.jit
def dense_keys_backward_kernel(
    problem,
    grad,
    dropout,
    limits,
    means,
    grad_key,
    grad_value,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradients of keys and values through the rows without a list.

    Args:
        problem: The scores.
        grad: Gradient of the output.
        dropout: Dropout.
        limits: Limits.
        means: Mean gradient of the weights ``(R,)`` of these rows.
        grad_key: ``(L, D)``, added to.
        grad_value: ``(L, D_V)``, added to.
    """
    tiles = tl.cdiv(problem.S, N)
    kv_heads = problem.H // problem.repeats
    batch = tl.program_id(0) // tiles // kv_heads
    kv_head = tl.program_id(0) // tiles % kv_heads
    columns = tl.program_id(0) % tiles * N + tl.arange(0, N)
    v = _load_rows(problem.value, batch, kv_head, columns, problem.S, D_V, BLOCK_V)
    grad_k = tl.zeros([N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([N, BLOCK_V], tl.float32)
    found = 0
    for index in range(problem.repeats * tl.cdiv(problem.T, M)):
        head = kv_head * problem.repeats + index % problem.repeats
        rows = index // problem.repeats * M + tl.arange(0, M)
        row = (batch * problem.H + head) * problem.T + rows
        wide = tl.load(limits.size + row, mask=rows < problem.T, other=0) < 0
        if tl.max(wide.to(tl.int32)) > 0:
            found = 1
            q = _load_rows(problem.query, batch, head, rows, problem.T, D, BLOCK_D)
            g = _load_rows(grad, batch, head, rows, problem.T, D_V, BLOCK_V)
            weight, factor = _dense_weights(
                problem, limits, dropout, q, batch, head, rows, columns, wide, CAUSAL, D
            )
            mean = tl.load(means + row, mask=wide, other=0.0)
            gradient = factor * _dot(g.to(v.dtype), tl.trans(v))
            gradient = weight * (gradient - mean[:, None])
            grad_k += _dot(tl.trans(gradient.to(q.dtype)), q)
            grad_v += _dot(tl.trans((weight * factor).to(v.dtype)), g.to(v.dtype))
    if found > 0:
        key = (batch * kv_heads + kv_head) * problem.S + columns
        inside = columns < problem.S
        _accumulate(grad_key, key, grad_k * problem.scale, inside, D)
        _accumulate(grad_value, key, grad_v, inside, D_V)


@triton.jit
def _accumulate(pointer, rows, x, inside, WIDTH: tl.constexpr):
    """Add to rows of a contiguous tensor ``(R, WIDTH)`` that no other program writes."""
    width = tl.arange(0, x.shape[1])
    place = rows.to(tl.int64)[:, None] * WIDTH + width[None, :]
    inside = inside[:, None] & (width < WIDTH)[None, :]
    tl.store(pointer + place, x + tl.load(pointer + place, mask=inside, other=0.0), mask=inside)
