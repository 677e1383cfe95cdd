"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_shared.attention._inputs import four_dimensional
from separata_shared.attention.topk import reference, triton
from separata_shared.attention.topk.triton_call import Call
from separata_shared.testing.strategies import AttentionInputs, attention_inputs
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytest.importorskip("triton", reason="triton, of the extra of the same name, is not installed")
pytestmark = [pytest.mark.gpu] if GPU else []

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GATHERING = Call.gathering
every_tie_rule = pytest.mark.parametrize("ties", ["keep", "exact"])


@pytest.fixture(autouse=True, scope="module")
def _large_blocks() -> Iterator[None]:
    """The interpreter takes as long for a small block as for a large one."""
    blocks = GATHERING if GPU else lambda *_: {"BLOCK_R": 32, "C": 16}
    with patch.object(Call, "gathering", blocks):
        yield


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    top_k: int | Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Run the kernels where they can run."""
    mask, bias = four_dimensional(mask), four_dimensional(bias)
    query, key, value, mask, bias = (
        None if x is None else x.to(DEVICE) for x in (query, key, value, mask, bias)
    )
    options = {"causal": False, "ties": "keep", "dropout": 0.0, **options}
    return triton.attend(query, key, value, top_k, mask=mask, bias=bias, **options).cpu()


def expected(
    query: Tensor, key: Tensor, value: Tensor, *, top_k: int | Tensor, **options: Any
) -> Tensor:
    """The reference, with the same defaults."""
    defaults = {"mask": None, "bias": None, "causal": False, "ties": "keep", "dropout": 0.0}
    return reference.attend(query, key, value, top_k, **{**defaults, **options})[0]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs_of(*shape: int, top_k: int, seed: int = 0, **options: Any) -> AttentionInputs:
    """Random inputs of ``B, H, H_kv, T, S, D, D_v``."""
    batch, heads, kv_heads, target, source, width, value_width = shape
    return AttentionInputs(
        query=normal(batch, heads, target, width, seed=seed),
        key=normal(batch, kv_heads, source, width, seed=seed + 1),
        value=normal(batch, kv_heads, source, value_width, seed=seed + 2),
        top_k=top_k,
        **{"mask": None, "bias": None, "causal": False, **options},
    )


@pytest.mark.skipif(GPU, reason="every width compiles the kernels again")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_tie_rule
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_output_and_gradients_are_as_good_as_the_reference(
    assert_as_good_as: Callable[..., None], dtype: torch.dtype, ties: str, data: st.DataObject
) -> None:
    inputs = data.draw(attention_inputs(dtypes=[dtype], gap=1e-4))
    options = {"top_k": inputs.top_k, "ties": ties}
    assert_as_good_as(partial(attend, **options), partial(expected, **options), inputs)


@pytest.mark.parametrize(
    ("shape", "top_k"),
    # several tiles of rows and of keys, one query, one pass of maxima for each depth of groups
    [
        ((1, 2, 1, 70, 150, 5, 33), 3),
        ((2, 1, 1, 1, 300, 128, 3), 9),
        ((1, 2, 2, 5, 130, 64, 16), 20),
        ((1, 1, 1, 9, 400, 20, 17), 100),
        ((1, 1, 1, 9, 600, 8, 8), 256),
    ],
    ids=str,
)
def test_larger_shapes(
    assert_as_good_as: Callable[..., None], shape: tuple[int, ...], top_k: int
) -> None:
    batch, *_, target, source, _, _ = shape
    mask = torch.arange(source) < torch.tensor([source - 9, source])[:batch].view(-1, 1, 1, 1)
    inputs = inputs_of(*shape, top_k=top_k, mask=mask, causal=target > 1)
    # measured for these seeds: the selection of every row is the same in float32 and float64
    assert inputs.gap() > 1e-7
    assert_as_good_as(partial(attend, top_k=top_k), partial(expected, top_k=top_k), inputs)


def test_blocks_as_they_are_on_a_gpu(results_of: Callable[..., list[Tensor]]) -> None:
    inputs = inputs_of(1, 2, 1, 20, 70, 64, 64, top_k=9)
    wanted = results_of(partial(expected, top_k=9), inputs)
    with patch.object(Call, "gathering", GATHERING):
        found = results_of(partial(attend, top_k=9), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def tied() -> AttentionInputs:
    """Ties in different numbers, where k = 4 leaves room for 32 candidates and a list of 12 keys.

    Products of small integers, halved (D = 4), are exact in every order of summation.
    """
    inputs = inputs_of(1, 2, 1, 5, 100, 4, 3, top_k=4)
    query, key = inputs.query.round(), inputs.key.round()
    query[:, 0, :2] = 0.0  # all scores are equal
    query[:, :, 2] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    key[:, :, :20, 3] = 5.0  # the 20 largest ones are
    return replace(inputs, query=query, key=key)


@every_tie_rule
@pytest.mark.parametrize("case", ["plain", "mask", "bias", "bias of keys"])
def test_rows_whose_lists_overflow_are_the_references(
    results_of: Callable[..., list[Tensor]], ties: str, case: str
) -> None:
    inputs = tied()
    if case == "mask":
        inputs = replace(inputs, mask=normal(1, 1, 5, 100, seed=3) > -0.5, causal=True)
    elif case == "bias":
        inputs = replace(inputs, bias=normal(2, 5, 100, seed=3).round())
    elif case == "bias of keys":
        inputs = replace(inputs, bias=torch.zeros(1, 100))
    assert inputs.gap() == 0
    found = results_of(partial(attend, top_k=4, ties=ties), inputs)
    wanted = results_of(partial(expected, top_k=4, ties=ties), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_overflow_in_half_precision(
    assert_as_good_as: Callable[..., None], dtype: torch.dtype
) -> None:
    inputs = tied().to(dtype)
    assert_as_good_as(partial(attend, top_k=4), partial(expected, top_k=4), inputs)


def test_tied_rows_have_lists_or_not() -> None:
    sizes: list[Tensor] = []
    with patch.object(triton, "_dense_gradients", lambda *a: sizes.append(a[2].size.cpu())):
        output = attend(*tied().leaves().tensors, top_k=4)
        output.sum().backward()
    first, second = sizes[0].view(2, 5)
    assert (first[:3] == -1).all()
    assert (second[3:] >= 4).all()


ADVERSARIAL = {
    "all equal": torch.zeros(100),
    "one huge": torch.zeros(100).index_fill(0, torch.tensor([77]), 1e30),
    "ascending": torch.arange(100.0) / 10,
    "descending": -torch.arange(100.0) / 10,
    "denormal": torch.arange(100.0) * 1e-42,
    "one key": torch.full((100,), -torch.inf).index_fill(0, torch.tensor([71]), 2.0),
    "no key": torch.full((100,), -torch.inf),
    "lowest": torch.full((100,), torch.finfo(torch.float32).min).index_fill(
        0, torch.tensor([3]), 0.0
    ),
}


@every_tie_rule
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_scores(results_of: Callable[..., list[Tensor]], ties: str, name: str) -> None:
    inputs = inputs_of(1, 1, 1, 3, 100, 4, 5, top_k=3, bias=ADVERSARIAL[name].expand(3, 100))
    inputs = replace(inputs, query=torch.zeros_like(inputs.query))
    found = results_of(partial(attend, top_k=3, ties=ties), inputs)
    wanted = results_of(partial(expected, top_k=3, ties=ties), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@every_tie_rule
def test_each_row_may_have_its_own_k_and_more_than_announced(
    results_of: Callable[..., list[Tensor]], ties: str
) -> None:
    inputs = inputs_of(1, 2, 1, 3, 80, 4, 5, top_k=0)
    top_k = torch.tensor([[1, 7, 60], [80, 3, 999]])
    for most in (None, 9):
        call = partial(attend, top_k=top_k, ties=ties, most_keys=most)
        wanted = results_of(partial(expected, top_k=top_k, ties=ties), inputs)
        for one, other in zip(results_of(call, inputs), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_sums_by_atomics_are_those_of_the_sorted_lists(
    results_of: Callable[..., list[Tensor]], with_bias: bool
) -> None:
    """The fixture of this folder asks for deterministic algorithms; here both ways run."""
    bias = normal(2, 5, 100, seed=3).round() if with_bias else None
    inputs = replace(tied(), bias=bias)
    call = partial(attend, top_k=4)
    sorted_by_key = results_of(call, inputs)
    again = results_of(call, inputs)
    torch.use_deterministic_algorithms(False)
    try:
        by_atomics = results_of(call, inputs)
    finally:
        torch.use_deterministic_algorithms(True)
    for one, other, same in zip(by_atomics, sorted_by_key, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert torch.equal(other, same)


@pytest.mark.parametrize("overflow", [False, True])
def test_dropout_drops_weights_and_their_gradients(overflow: bool) -> None:
    inputs = inputs_of(1, 2, 1, 9, 70, 4, 70, top_k=20)
    if overflow:  # all keys are kept
        inputs = replace(inputs, query=inputs.query.round(), key=torch.ones_like(inputs.key))
    identity = torch.eye(70).expand_as(inputs.value)  # the output is the row of weights
    query, key, value = replace(inputs, value=identity).leaves().tensors
    weights = expected(query, key, value, top_k=20).detach()
    torch.manual_seed(0)
    output = attend(query, key, value, top_k=20, dropout=0.25)
    kept = output > 0
    torch.testing.assert_close(output, torch.where(kept, weights / 0.75, 0), rtol=1e-5, atol=0)
    assert 0.7 < float(kept.sum() / (weights > 0).sum()) < 0.8
    # What is random is fixed: the gradients are those of the weights times constants.
    upstream = normal(*output.shape, seed=5)
    found = torch.autograd.grad(output, (query, key, value), upstream)
    constants = (kept / 0.75).float()
    scores = query @ key.mT / 2
    again = scores.masked_fill(weights == 0, -torch.inf).softmax(-1) * constants
    wanted = torch.autograd.grad(again @ value, (query, key, value), upstream)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_dropout_follows_the_seed_of_torch() -> None:
    inputs = inputs_of(2, 2, 1, 7, 20, 4, 5, top_k=12)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(attend(*inputs.tensors, top_k=12, dropout=0.5))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kept_state_grows_with_k_not_with_keys(dropout: float) -> None:
    inputs = inputs_of(1, 1, 1, 30, 300, 8, 8, top_k=8).leaves()
    tensors = [x.detach().to(DEVICE).requires_grad_() for x in inputs.tensors]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(*tensors, top_k=8, dropout=dropout)
    own = [x for x in kept if not any(x.data_ptr() == y.data_ptr() for y in tensors)]
    # a key and a weight for each slot, five numbers for each row, a seed
    assert sum(x.numel() for x in own) == 30 * (2 * 16 + 5) + (dropout > 0)


@pytest.mark.slow
def test_operators_are_sound_for_the_compiler() -> None:
    tensors = [normal(1, 2, 9, 8, seed=seed).to(DEVICE).requires_grad_() for seed in range(3)]
    bias = normal(1, 2, 9, 9).to(DEVICE).requires_grad_()
    arguments = (*tensors, None, 3, None, bias, True, "keep", 0.0)
    torch.library.opcheck(triton._forward, arguments)


def test_second_derivatives_are_refused() -> None:
    query, key, value = inputs_of(1, 1, 1, 3, 9, 4, 4, top_k=2).leaves().tensors
    output = attend(query, key, value, top_k=2)
    (gradient,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_what_is_not_served_has_a_reason() -> None:
    def reason(most_keys: int | None = 8, return_weights: bool = False, **options: Any) -> str:
        width, dtype = options.get("width", 64), options.get("dtype", torch.float32)
        tensors = (torch.empty(1, 1, 2, width, dtype=dtype, device=DEVICE),) * 3
        return triton.supports(*tensors, most_keys=most_keys, return_weights=return_weights) or ""

    assert reason() == ""
    assert reason(most_keys=256) == reason(most_keys=None) == ""
    assert "256 keys" in reason(most_keys=257)
    assert "128 keys" in reason(most_keys=256, width=256)
    assert reason(most_keys=256, width=256, dtype=torch.bfloat16) == ""
    assert "256 wide" in reason(width=257)
    assert "float64" in reason(dtype=torch.float64)
    assert "weights" in reason(return_weights=True)
    with patch("importlib.util.find_spec", return_value=None):
        assert "not installed" in reason()
    if not GPU:
        with patch.dict(os.environ, TRITON_INTERPRET="0"):
            assert "GPU" in reason()


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, *_: 0

triton.runtime.driver.set_active(Driver())
run, names = JITFunction.run, set()

def compile_only(self, *arguments, grid, warmup, **options):
    name = self.fn.__name__
    if name not in names or name in ("search_kernel", "lists_backward_kernel", AGAIN):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        assert kernel.metadata.shared <= 227 * 1024
        names.add(name)

AGAIN = "dense_queries_backward_kernel"
JITFunction.run = compile_only
from separata_shared.attention.topk.triton import attend

for first in (True, False):
    torch.use_deterministic_algorithms(first)
    query, key, value = (torch.zeros(1, 2, 64, 16, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.zeros(1, 2, 64 if first else 1, 64, requires_grad=True)
    mask = torch.ones(1, 1, 1 if first else 64, 64) > 0
    ties, dropout = ("exact", 0.1) if first else ("keep", 0.0)
    options = dict(causal=first, ties=ties, dropout=dropout)
    top_k = torch.tensor(3) if first else 40
    attend(query, key, value, top_k, mask=mask, bias=bias, **options).sum().backward()
assert len(names) == 7, names
"""


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="the other tests have compiled the kernels")
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """What the interpreter forgives, such as a loop that changes a type, the compiler refuses."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
