"""Gradients, through the lists of kept keys and in the rows without one."""

# Arguments of kernels have no Python types, and capitals are constants of compilation:
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# mypy: disable-error-code="import-not-found, import-untyped"
# ruff: noqa: N803

import triton
import triton.language as tl

from separata_shared.attention.topk.triton_kernels.scores import (
    compute_scores,
    dot,
    dropout_factor,
    end_of_keys,
    gather,
    head_start,
    keeps,
    load_rows,
    locate_rows,
    locate_tile,
    missing_scale,
    store_rows,
)


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
    batch, head, _ = locate_rows(problem, rows)
    inside = slots[None, :] < size[:, None]
    place = rows.to(tl.int64)[:, None] * SLOTS + slots[None, :]
    keys = tl.load(columns + place, mask=inside, other=0)
    weight = tl.load(weights + place, mask=inside, other=0.0)
    kv_head = (head // problem.repeats)[:, None]
    v = gather(problem.value, batch[:, None], kv_head, keys, inside, D_V, g.shape[1])
    gradient = tl.sum(v * g[:, None, :], 2)
    used = weight
    if dropout.seed is not None:
        factor = dropout_factor(dropout, rows[:, None], keys)
        used *= factor
        gradient *= factor
    return keys, inside, weight, used, gradient


@triton.jit
def lists_backward_kernel(
    problem,
    grad,  # gradient of the output
    columns,  # listed keys (R, SLOTS)
    weights,  # their weights (R, SLOTS)
    dropout,
    limits,
    grad_query,  # (R, D), written for rows with a list
    grad_key,  # (L, D), added to unless grad_scores is given
    grad_value,  # (L, D_V), likewise
    grad_bias,  # added to; its data may be None
    grad_scores,  # (R, SLOTS), written; or None
    R,  # number of rows
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    C: tl.constexpr,
):
    """Gradients through the listed keys."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    size = tl.load(limits.size + rows, mask=rows < R, other=-1)
    batch, head, time = locate_rows(problem, rows)
    b, h, t = batch[:, None], head[:, None], time[:, None]
    every = (size >= 0)[:, None]
    g = tl.reshape(gather(grad, b, h, t, every, D_V, BLOCK_V), [BLOCK_R, BLOCK_V])
    q = tl.reshape(gather(problem.query, b, h, t, every, D, BLOCK_D), [BLOCK_R, BLOCK_D])

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
        k = gather(problem.key, b, kv_head, keys, inside, D, BLOCK_D)
        result += tl.sum(gradient[:, :, None] * k, 1)
        if grad_scores is not None:
            place = rows.to(tl.int64)[:, None] * SLOTS + slots[None, :]
            tl.store(grad_scores + place, gradient, mask=inside)
        else:
            key = (b * (problem.H // problem.repeats) + kv_head) * problem.S + keys
            share = (gradient * problem.scale)[:, :, None] * q[:, None, :]
            _add_rows(grad_key, key, share, inside, D)
            _add_rows(grad_value, key, used[:, :, None] * g[:, None, :], inside, D_V)
        if grad_bias.data is not None:
            _add_bias(grad_bias, b, h, t, keys, gradient, inside)
    store_rows(grad_query, rows, result * problem.scale, size >= 0, D)


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
    place = tl.broadcast_to(columns.to(tl.int64) * bias.strides[3], x.shape)
    if bias.strides[2] is not None:
        place = place + rows.to(tl.int64) * bias.strides[2]
    tl.atomic_add(head_start(bias, batch, head) + place, x, mask=inside, sem="relaxed")


@triton.jit
def keys_backward_kernel(
    problem,
    grad,  # gradient of the output
    weights,  # (R, SLOTS)
    dropout,
    grad_scores,  # (R, SLOTS)
    order,  # places in the two above, those of one key after those of the last
    offsets,  # where keys begin in order, (L + 1,)
    grad_key,  # (L, D), written
    grad_value,  # (L, D_V), written
    L,  # number of keys
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    C: tl.constexpr,
):
    """Gradients of keys and values from the lists sorted by key: always summed in one order."""
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
            weight *= dropout_factor(dropout, rows, (keys % problem.S)[:, None] + rows * 0)
        batch, head, time = locate_rows(problem, rows)
        q = gather(problem.query, batch, head, time, inside, D, BLOCK_D)
        grad_k += tl.sum(score[:, :, None] * q, 1)
        g = gather(grad, batch, head, time, inside, D_V, BLOCK_V)
        grad_v += tl.sum(weight[:, :, None] * g, 1)
    store_rows(grad_key, keys, grad_k * problem.scale, keys < L, D)
    store_rows(grad_value, keys, grad_v, keys < L, D_V)


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
    scores = compute_scores(problem, q, batch, head, rows, columns, CAUSAL, D)
    kept = keeps(scores, columns[None, :], threshold, last)
    weight = tl.exp((scores - highest[:, None]) * missing_scale(problem)) / total[:, None]
    factor = tl.full(scores.shape, 1.0, tl.float32)
    if dropout.seed is not None:
        factor = dropout_factor(dropout, row[:, None], columns[None, :])
    return tl.where(kept, weight, 0.0), factor


@triton.jit
def dense_queries_backward_kernel(
    problem,
    grad,  # gradient of the output
    dropout,
    limits,
    grad_query,  # (R, D), written for these rows
    grad_bias,  # added to; its data may be None
    means,  # mean gradient of the weights (R,), written for these rows
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradients of the queries without a list."""
    tile, batch, head = locate_tile(tl.cdiv(problem.T, M), problem)
    rows = tile * M + tl.arange(0, M)
    row = (batch * problem.H + head) * problem.T + rows
    wide = tl.load(limits.size + row, mask=rows < problem.T, other=0) < 0
    if tl.max(wide.to(tl.int32)) > 0:
        kv_head = head // problem.repeats
        stop = end_of_keys(problem, tl.minimum(tile * M + M, problem.T), CAUSAL)
        q = load_rows(problem.query, batch, head, rows, problem.T, D, BLOCK_D)
        g = load_rows(grad, batch, head, rows, problem.T, D_V, BLOCK_V)
        mean = tl.zeros([M], tl.float32)
        for start in range(0, stop, N):
            columns = start + tl.arange(0, N)
            weight, factor = _dense_weights(
                problem, limits, dropout, q, batch, head, rows, columns, wide, CAUSAL, D
            )
            v = load_rows(problem.value, batch, kv_head, columns, problem.S, D_V, BLOCK_V)
            mean += tl.sum(weight * factor * dot(g.to(v.dtype), tl.trans(v)), 1)
        result = tl.zeros([M, BLOCK_D], tl.float32)
        for start in range(0, stop, N):
            columns = start + tl.arange(0, N)
            weight, factor = _dense_weights(
                problem, limits, dropout, q, batch, head, rows, columns, wide, CAUSAL, D
            )
            v = load_rows(problem.value, batch, kv_head, columns, problem.S, D_V, BLOCK_V)
            gradient = factor * dot(g.to(v.dtype), tl.trans(v))
            gradient = weight * (gradient - mean[:, None])
            k = load_rows(problem.key, batch, kv_head, columns, problem.S, D, BLOCK_D)
            result += dot(gradient.to(k.dtype), k)
            if grad_bias.data is not None:
                inside = weight > 0.0
                _add_bias(grad_bias, batch, head, rows[:, None], columns[None, :], gradient, inside)
        store_rows(grad_query, row, result * problem.scale, wide, D)
        tl.store(means + row, mean, mask=wide)


@triton.jit
def dense_keys_backward_kernel(
    problem,
    grad,  # gradient of the output
    dropout,
    limits,
    means,  # mean gradient of the weights (R,) of these rows
    grad_key,  # (L, D), added to
    grad_value,  # (L, D_V), added to
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradients of keys and values through the rows without a list."""
    tiles = tl.cdiv(problem.S, N)
    kv_heads = problem.H // problem.repeats
    batch = tl.program_id(0) // tiles // kv_heads
    kv_head = tl.program_id(0) // tiles % kv_heads
    columns = tl.program_id(0) % tiles * N + tl.arange(0, N)
    v = load_rows(problem.value, batch, kv_head, columns, problem.S, D_V, BLOCK_V)
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
            q = load_rows(problem.query, batch, head, rows, problem.T, D, BLOCK_D)
            g = load_rows(grad, batch, head, rows, problem.T, D_V, BLOCK_V)
            weight, factor = _dense_weights(
                problem, limits, dropout, q, batch, head, rows, columns, wide, CAUSAL, D
            )
            mean = tl.load(means + row, mask=wide, other=0.0)
            gradient = factor * dot(g.to(v.dtype), tl.trans(v))
            gradient = weight * (gradient - mean[:, None])
            grad_k += dot(tl.trans(gradient.to(q.dtype)), q)
            grad_v += dot(tl.trans((weight * factor).to(v.dtype)), g.to(v.dtype))
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
