"""The C++ kernels of top-k attention: every set of instructions, long rows, threads, bad luck."""

import ctypes
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_shared import native as machinery
from separata_shared.attention import topk_attention
from separata_shared.attention.topk import native
from separata_shared.testing.strategies import AttentionInputs, attention_inputs
from torch import Tensor

LEVELS = range(4)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A set of instructions that this machine has."""
    if request.param > native.library().topk_best_level():
        name = native.library().topk_level_name(request.param).decode()
        pytest.skip(f"this CPU has no {name}")
    monkeypatch.setattr(native, "LEVEL", request.param)
    return request.param


def random_inputs(
    shape: tuple[int, ...], top_k: int, seed: int = 0, **options: Any
) -> AttentionInputs:
    """Inputs of ``(batch, heads, kv_heads, target, source, width, value_width)``."""
    batch, heads, kv_heads, target, source, width, value_width = shape
    random = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=random)
    return AttentionInputs(
        query=normal(batch, heads, target, width),
        key=normal(batch, kv_heads, source, width),
        value=normal(batch, kv_heads, source, value_width),
        top_k=top_k,
        **{"mask": None, "bias": None, "causal": False, **options},
    )


@settings(max_examples=40, deadline=None)
@given(
    inputs=attention_inputs(
        max_length=150, gap=1e-3, dtypes=(torch.float32, torch.bfloat16, torch.float16)
    ),
    ties=st.sampled_from(["keep", "exact"]),
)
def test_agrees_with_the_reference_in_rows_of_several_vectors(
    assert_as_good_as: Callable[..., None], inputs: AttentionInputs, ties: str
) -> None:
    call = partial(topk_attention, top_k=inputs.top_k, ties=ties)
    assert_as_good_as(partial(call, impl="native"), partial(call, impl="reference"), inputs)


@pytest.mark.parametrize("top_k", [1, 8, 24, 70, 256])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 2, 40, 64, 64, 64),
        (1, 4, 2, 7, 700, 33, 17),  # several blocks of keys, odd widths, grouped heads
        (1, 1, 1, 1, 4100, 64, 64),  # decoding: more vectors than one word of hits has bits
        (1, 2, 2, 300, 130, 16, 200),  # more queries than keys
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_every_set_of_instructions_agrees_with_the_reference(
    assert_as_good_as: Callable[..., None],
    level: int,
    shape: tuple[int, ...],
    top_k: int,
    causal: bool,
) -> None:
    inputs = random_inputs(shape, top_k, causal=causal)
    if inputs.gap() < 1e-6:
        inputs = random_inputs(shape, top_k, seed=1, causal=causal)
    call = partial(topk_attention, top_k=top_k)
    assert_as_good_as(partial(call, impl="native"), partial(call, impl="reference"), inputs)


HARD = ["equal", "rising", "falling", "denormal", "none", "one"]
HARD += ["periodic", "one huge", "two values"]


def scores(kind: str, target: int, source: int) -> Tensor:
    """Rows of scores that are hard to select from, ``(T, S)``."""
    rising = torch.arange(source, dtype=torch.float32).expand(target, source) / 64
    huge = torch.randn(target, source, generator=torch.Generator().manual_seed(0))
    huge[:, source // 2] = 1e30
    one = torch.full((target, source), -torch.inf)
    one[:, source // 3] = 2.0
    return {
        "equal": torch.ones(target, source),
        "rising": rising,
        "falling": -rising,
        "one huge": huge,
        "denormal": rising * 1e-40,
        "none": torch.full((target, source), -torch.inf),
        "one": one,
        "periodic": rising.remainder(1.0),
        "two values": (rising * 64).remainder(7.0).eq(0).float(),
    }[kind]


@pytest.mark.parametrize("ties", ["keep", "exact"])
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("source", [50, 333])
def test_kept_keys_of_hard_rows_are_those_of_the_reference(
    level: int, kind: str, ties: str, source: int
) -> None:
    # Scores are the bias alone, and the values show the weight of each key.
    query = torch.zeros(1, 1, 3, 16)
    key = torch.zeros(1, 1, source, 16)
    value = torch.eye(source)[None, None]
    bias = scores(kind, 3, source)
    call = partial(topk_attention, query, key, value, bias=bias, ties=ties)
    for top_k in (1, 8, 20):
        found = call(top_k=top_k, impl="native")
        wanted = call(top_k=top_k, impl="reference")
        assert torch.equal(found > 0, wanted > 0)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(
    results_of: Callable[..., list[Tensor]], heads: int, causal: bool
) -> None:
    inputs = random_inputs((1, heads, 1, 700, 300, 24, 24), 8, causal=causal)
    call = partial(topk_attention, top_k=8, impl="native")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results_of(call, inputs))
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_backward_sees_the_dropout_of_its_forward() -> None:
    inputs = random_inputs((1, 2, 2, 9, 40, 8, 40), 12)
    query, key, _ = (x.double() for x in inputs.tensors)
    leaves = [x.clone().requires_grad_() for x in inputs.tensors[:2]]
    value = torch.eye(40).expand(1, 2, 40, 40).clone().requires_grad_()
    call = partial(topk_attention, top_k=12, impl="native")
    weights = call(*leaves, value).detach()
    torch.manual_seed(3)
    dropped = call(*leaves, value, dropout=0.4)
    factor = torch.where(weights > 0, dropped.detach() / weights, 0.0).double()
    assert set(factor[weights > 0].mul(0.6).round().unique().tolist()) == {0.0, 1.0}

    upstream = torch.randn(dropped.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(dropped, [*leaves, value], upstream)
    query, key, values = (x.requires_grad_() for x in (query, key, value.detach().double()))
    kept = (query @ key.mT * 8**-0.5).masked_fill(weights == 0, -torch.inf)
    expected = (kept.softmax(-1) * factor) @ values
    wanted = torch.autograd.grad(expected, [query, key, values], upstream.double())
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


def test_dropout_drops_the_share_asked_for() -> None:
    inputs = random_inputs((4, 4, 4, 64, 64, 8, 64), 32)
    value = torch.eye(64).expand(4, 4, 64, 64)
    torch.manual_seed(0)
    output = topk_attention(*inputs.tensors[:2], value, top_k=32, dropout=0.25, impl="native")
    share = 1 - (output > 0).sum() / (4 * 4 * 64 * 32)
    assert abs(float(share) - 0.25) < 0.015  # six standard deviations of 32,768 draws


def test_backward_keeps_k_entries_of_a_row() -> None:
    inputs = random_inputs((1, 2, 2, 128, 512, 16, 16), 8).leaves()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        topk_attention(*inputs.tensors, top_k=8, impl="native")
    rows = 2 * 128
    arguments = sum(x.numel() * 4 for x in inputs.tensors)
    entries = rows * 8 * (4 + 4) + (rows + 1) * 4
    assert sum(x.numel() * x.element_size() for x in kept) == arguments + entries


@pytest.mark.parametrize("with_bias", [False, True])
def test_operators_are_sound_for_the_compiler(with_bias: bool) -> None:
    inputs = random_inputs((2, 4, 2, 9, 40, 8, 6), 5).leaves()
    bias = torch.randn(4, 9, 40, requires_grad=True)[None] if with_bias else None
    arguments = (*inputs.tensors, torch.as_tensor(5), None, bias, True, "keep", 0.0)
    torch.library.opcheck(native._forward, arguments)


def test_second_derivatives_are_refused() -> None:
    inputs = random_inputs((1, 1, 1, 4, 9, 8, 8), 3).leaves()
    output = topk_attention(*inputs.tensors, top_k=3, impl="native")
    (grad,) = torch.autograd.grad(output.sum(), inputs.query, create_graph=True)
    with pytest.raises(RuntimeError, match="topk_attention_native_backward"):
        grad.sum().backward()


def test_without_a_compiler_auto_warns_once_and_uses_other_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> ctypes.CDLL:
        raise machinery.UnavailableError("there is no compiler")

    monkeypatch.setattr(machinery, "load", fail)
    native.library.cache_clear()
    native._available.cache_clear()
    try:
        inputs = random_inputs((1, 1, 1, 64, 600, 8, 8), 3)
        with pytest.warns(UserWarning, match="there is no compiler"):
            first = topk_attention(*inputs.tensors, top_k=3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = topk_attention(*inputs.tensors, top_k=3)
        with pytest.raises(ValueError, match="could not be compiled"):
            topk_attention(*inputs.tensors, top_k=3, impl="native")
    finally:
        native.library.cache_clear()
        native._available.cache_clear()
    assert torch.equal(first, second)
    monkeypatch.undo()
    torch.testing.assert_close(first, topk_attention(*inputs.tensors, top_k=3, impl="native"))
