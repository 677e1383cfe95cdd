"""Scores, their order and what else the forward and the backward kernels have in common."""

# Arguments of kernels have no Python types, and capitals are constants of compilation:
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# mypy: disable-error-code="import-not-found, import-untyped"
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
    """A tensor of four dimensions, or None; a third stride of None: all rows are equal."""

    data: Any
    strides: Any


class Problem(NamedTuple):
    """What defines the scores."""

    query: Strided
    key: Strided
    value: Strided
    mask: Strided
    bias: Strided
    top_k: Strided  # (B, H, T); a number has strides of None
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
def head_start(x, batch, head):
    """Address of a head."""
    return x.data + batch.to(tl.int64) * x.strides[0] + head.to(tl.int64) * x.strides[1]


@triton.jit
def load_rows(x, batch, head, rows, size, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a head, ``(rows, BLOCK)``, zero outside."""
    width = tl.arange(0, BLOCK)
    inside = (rows < size)[:, None]
    if WIDTH < BLOCK:
        inside = inside & (width < WIDTH)[None, :]
    place = rows.to(tl.int64)[:, None] * x.strides[2] + width[None, :] * x.strides[3]
    return tl.load(head_start(x, batch, head) + place, mask=inside, other=0.0)


@triton.jit
def gather(x, batch, head, rows, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``(R, C)`` of the heads ``(R, 1)`` or ``(R, C)``: float32 ``(R, C, BLOCK)``."""
    width = tl.arange(0, BLOCK)
    inside = inside[:, :, None]
    if WIDTH < BLOCK:
        inside = inside & (width < WIDTH)[None, None, :]
    start = head_start(x, batch, head) + rows.to(tl.int64) * x.strides[2]
    place = start[:, :, None] + (width * x.strides[3])[None, None, :]
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_tile(x, batch, head, rows, columns, T, S):
    """Part of a mask or bias, ``(M, N)`` or ``(1, N)`` where it is the same in all rows."""
    inside = (columns < S)[None, :]
    place = columns.to(tl.int64)[None, :] * x.strides[3]
    if x.strides[2] is not None:
        inside = inside & (rows < T)[:, None]
        place = place + rows.to(tl.int64)[:, None] * x.strides[2]
    return tl.load(head_start(x, batch, head) + place, mask=inside, other=0)


@triton.jit
def dot(a, b):
    """Product of matrices, summed in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def locate_tile(tiles, problem):
    """Tile of rows, batch element and head of this program; long causal rows come first."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    return tile, head // problem.H, head % problem.H


@triton.jit
def locate_rows(problem, rows):
    """Batch element, head and time of rows that are counted through."""
    head = rows // problem.T
    return head // problem.H, head % problem.H, rows % problem.T


@triton.jit
def load_top_k(problem, batch, head, time, inside):
    """Give k of each row, or of all rows."""
    k = problem.top_k.data
    if problem.top_k.strides is not None:
        strides = problem.top_k.strides
        k = tl.load(
            k + batch * strides[0] + head * strides[1] + time * strides[2], mask=inside, other=1
        )
    return k


@triton.jit
def end_of_keys(problem, rows_stop, CAUSAL: tl.constexpr):
    """The end of the keys that rows before ``rows_stop`` may attend."""
    stop = problem.S
    if CAUSAL:
        stop = tl.minimum(stop, rows_stop + problem.S - problem.T)
    return stop


@triton.jit
def compute_scores(problem, q, batch, head, rows, columns, CAUSAL: tl.constexpr, D: tl.constexpr):
    """Scores ``(M, N)``, ``-inf`` where a key is not allowed.

    Without a bias they still lack the scale, which does not matter for the selection. Every kernel
    computes a score by the same instructions, so that all find the same number.
    """
    T, S = problem.T, problem.S
    k = load_rows(problem.key, batch, head // problem.repeats, columns, S, D, q.shape[1])
    scores = dot(q, tl.trans(k))
    allowed = (columns < S)[None, :]
    if CAUSAL:
        allowed = allowed & (columns[None, :] <= rows[:, None] + (S - T))
    if problem.mask.data is not None:
        allowed = allowed & (load_tile(problem.mask, batch, head, rows, columns, T, S) != 0)
    if problem.bias.data is not None:
        bias = load_tile(problem.bias, batch, head, rows, columns, T, S)
        scores = scores * problem.scale + bias.to(tl.float32)
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def missing_scale(problem):
    """The factor that scores still lack."""
    if problem.bias.data is not None:
        return 1.0
    else:
        return problem.scale


@triton.jit
def place_of(x):
    """The place of floats in the order of all floats, an integer."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def float_at(place):
    """The floats at these places."""
    return tl.where(place >= 0, place, place ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(x, k, BITS: tl.constexpr):
    """The k-th largest of each row of ``x``, exact for 31 bits, else a little lower.

    At least the lowest finite number, so that no ``-inf`` is as large.
    """
    places = place_of(x)
    place = tl.where(tl.sum((places >= 0).to(tl.int32), 1) >= k, 0, INT_MIN)
    for step in range(BITS):
        trial = place | (1 << (30 - step))
        count = tl.sum((places >= trial[:, None]).to(tl.int32), 1)
        place = tl.where(count >= k, trial, place)
    return float_at(tl.maximum(place, LOWEST))


@triton.jit
def keeps(scores, keys, threshold, last):
    """Whether rows keep keys; both ``(rows, keys)``."""
    equal = (scores == threshold[:, None]) & (keys <= last[:, None])
    return (scores > threshold[:, None]) | equal


@triton.jit
def dropout_factor(dropout, rows, columns):
    """Factors that dropout gives to weights."""
    random, _, _, _ = tl.philox(tl.load(dropout.seed), columns, rows, columns * 0, columns * 0)
    kept = tl.uint_to_uniform_float(random) >= dropout.probability
    return tl.where(kept, 1.0 / (1.0 - dropout.probability), 0.0)


@triton.jit
def store_rows(pointer, rows, x, inside, WIDTH: tl.constexpr):
    """Store rows of a contiguous tensor ``(R, WIDTH)``."""
    width = tl.arange(0, x.shape[1])
    place = rows.to(tl.int64)[:, None] * WIDTH + width[None, :]
    tl.store(pointer + place, x, mask=inside[:, None] & (width < WIDTH)[None, :])
