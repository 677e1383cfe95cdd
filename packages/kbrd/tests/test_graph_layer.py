"""The graph layer: what the equations promise, and that all implementations compute it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_kbrd import native, portable
from separata_kbrd.edges import NORMALISERS, EdgeIndex, neighbour_mean, neighbour_sum
from separata_kbrd.model import (
    RelationalGraphLayer,
    initialise_glorot,
    initialise_uniform,
)
from separata_kbrd.relational import neighbours, relational_sum
from separata_shared import native as machinery
from separata_shared.testing.timing import saved_bytes
from torch import Tensor

N, R, B, d = 40, 5, 3, 7
IMPLS = ["reference", "portable", "native"]
# With ``derandomize`` the cases are the same in every run.
examples = settings(max_examples=25, deadline=None, derandomize=True)
needs_compiler = pytest.mark.skipif(not native.available(), reason="no compiler")


def make_edges(nodes: int = N, relations: int = R, count: int = 200, *, seed: int = 0) -> Tensor:
    """Distinct edges, self loops under the last relation among them, in no order."""
    random = torch.Generator().manual_seed(seed)
    sizes = (nodes, nodes, max(relations - 1, 1))
    columns = [torch.randint(size, (count,), generator=random) for size in sizes]
    loops = torch.arange(nodes)
    loops = torch.stack([loops, loops, torch.full_like(loops, relations - 1)], dim=1)
    edges = torch.cat([torch.stack(columns, dim=1), loops]).unique(dim=0)
    return edges[torch.randperm(len(edges), generator=random)]


def index(edges: Tensor, normaliser: Any = neighbour_sum, **sizes: int) -> EdgeIndex:
    sizes = {"num_nodes": N, "num_relations": R} | sizes
    return EdgeIndex(edges, normaliser=normaliser, **sizes)


def weights(seed: int = 0, sizes: tuple[int, int, int, int] = (N, R, B, d)) -> list[Tensor]:
    """Basis, att, root and bias in float64."""
    n, r, b, width = sizes
    random = torch.Generator().manual_seed(seed)
    shapes = ((n, b, width), (r, b), (n, width), (width,))
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


def run(tensors: list[Tensor], edges: EdgeIndex, upstream: Tensor, impl: Any) -> list[Tensor]:
    """Output and the gradients of all weights."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    H = relational_sum(*tensors, edges, impl=impl)
    return [H.detach(), *torch.autograd.grad(H, tensors, upstream)]


def by_hand(tensors: list[Tensor], edges: Tensor, normaliser: str) -> Tensor:
    """The sum written as loops over nodes and edges."""
    basis, att, root, bias = tensors
    H = root + bias
    rows = edges.tolist()
    for j, i, r in rows:
        neighbours_of_i = sum(1 for _, target, other in rows if (target, other) == (i, r))
        c = 1 if normaliser == "sum" else 1 / neighbours_of_i
        H[i] += c * sum(att[r, b] * basis[j, b] for b in range(len(att[r])))
    return H


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_the_reference_is_the_sum_over_edges(normaliser: str) -> None:
    edges = make_edges()
    found = relational_sum(*weights(), index(edges, NORMALISERS[normaliser]), impl="reference")
    assert torch.allclose(found, by_hand(weights(), edges, normaliser), rtol=0, atol=1e-13)


def test_gradients_of_the_reference_are_right() -> None:
    tensors = [t.requires_grad_() for t in weights(sizes=(4, 3, 2, 3))]
    edges = index(make_edges(4, 3, 9), neighbour_mean, num_nodes=4, num_relations=3)
    call: Callable[..., Tensor] = lambda *t: relational_sum(*t, edges, impl="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors)


@examples
@given(
    sizes=st.tuples(st.integers(1, 600), st.integers(1, 6), st.integers(1, 9), st.integers(1, 70)),
    count=st.integers(1, 900),
    normaliser=st.sampled_from(list(NORMALISERS.values())),
    seed=st.integers(0, 99),
)
def test_implementations_agree_with_the_reference(
    sizes: tuple[int, int, int, int], count: int, normaliser: Any, seed: int
) -> None:
    nodes, relations, _, width = sizes
    graph = make_edges(nodes, relations, count, seed=seed)
    edges = index(graph, normaliser, num_nodes=nodes, num_relations=relations)
    exact = weights(seed, sizes)
    upstream = torch.randn(nodes, width, dtype=torch.float64)
    wanted = run(exact, edges, upstream, "reference")
    close(run(exact, edges, upstream, "portable"), wanted, 1e-12)
    rounded = [tensor.float() for tensor in exact]
    wanted = run([t.double() for t in rounded], edges, upstream.float().double(), "reference")
    # Sums of either sign cancel; what float32 rounds is their size before that.
    sizes = run([t.double().abs() for t in rounded], edges, upstream.abs(), "reference")
    for impl in ("portable", "native") if native.available() else ("portable",):
        found = run(rounded, edges, upstream.float(), impl)
        for tensor, expected, size in zip(found, wanted, sizes, strict=True):
            assert ((tensor - expected).abs() <= 2e-6 * size).all()


def close(found: list[Tensor], wanted: list[Tensor], share: float) -> None:
    """Compare relative to the largest number of each tensor."""
    for tensor, expected in zip(found, wanted, strict=True):
        assert tensor.shape == expected.shape
        assert (tensor - expected).abs().max() <= share * max(expected.abs().max().item(), 1.0)


@needs_compiler
@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("width", [1, 4, 15, 16, 64, 128, 131])
def test_every_instruction_set_agrees(
    level: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if level > native.best_level():
        pytest.skip("not on this machine")
    monkeypatch.setattr(native, "LEVEL", level)
    tensors = [t.float() for t in weights(1, (N, R, B, width))]
    upstream = torch.randn(N, width, generator=torch.Generator().manual_seed(2))
    edges = index(make_edges(), neighbour_mean)
    wanted = run([t.double() for t in tensors], edges, upstream.double(), "reference")
    close(run(tensors, edges, upstream, "native"), wanted, 1e-5)


@needs_compiler
def test_the_number_of_threads_changes_no_bit() -> None:
    nodes = 3000  # several blocks
    graph = make_edges(nodes, R, 9000)
    edges = index(graph, num_nodes=nodes)
    tensors = [t.float() for t in weights(0, (nodes, R, B, 20))]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(run(tensors, edges, torch.ones(nodes, 20), "native"))
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normaliser", NORMALISERS.values(), ids=NORMALISERS)
class TestProperties:
    """Acceptance check 1 of the specification."""

    @pytest.fixture
    def layer(self, impl: str, normaliser: Any) -> Callable[..., Tensor]:
        """The output for edges and weights."""
        if impl == "native" and not native.available():
            pytest.skip("no compiler")
        dtype = torch.float32 if impl == "native" else torch.float64

        def call(edges: Tensor, tensors: list[Tensor]) -> Tensor:
            return relational_sum(
                *(tensor.to(dtype) for tensor in tensors),
                index(edges, normaliser),
                impl=impl,  # type: ignore[arg-type]
            )

        return call

    def test_the_order_of_edges_changes_nothing(self, layer: Callable[..., Tensor]) -> None:
        edges = make_edges()
        other = edges[torch.randperm(len(edges))]
        assert torch.equal(layer(edges, weights()), layer(other, weights()))

    def test_renumbering_the_nodes_renumbers_the_output(self, layer: Callable[..., Tensor]) -> None:
        edges = make_edges()
        basis, att, root, bias = weights()
        new = torch.randperm(N, generator=torch.Generator().manual_seed(3))
        moved = edges.clone()
        moved[:, :2] = new[edges[:, :2]]
        old = new.argsort()
        found = layer(moved, [basis[old], att, root[old], bias])
        assert torch.allclose(found[new], layer(edges, weights()), atol=1e-5)

    def test_a_relation_without_share_contributes_nothing(
        self, layer: Callable[..., Tensor]
    ) -> None:
        edges = make_edges()
        basis, att, root, bias = weights()
        att[2] = 0
        found = layer(edges, [basis, att, root, bias])
        assert torch.allclose(
            found, layer(edges[edges[:, 2] != 2], [basis, att, root, bias]), atol=1e-5
        )

    def test_a_node_with_its_self_loop_alone_is_its_own_vector(
        self, layer: Callable[..., Tensor]
    ) -> None:
        edges = make_edges()
        edges = edges[((edges[:, :2] != 11).all(dim=1)) | (edges[:, 2] == R - 1)]
        basis, att, root, bias = weights()
        own = (att[R - 1, :, None] * basis[11]).sum(0) + root[11] + bias
        assert torch.allclose(layer(edges, weights())[11].double(), own, atol=1e-5)

    def test_a_second_equal_neighbour(self, layer: Callable[..., Tensor], normaliser: Any) -> None:
        """It changes a mean by nothing and doubles a sum."""
        basis, att, root, bias = weights()
        basis[1] = basis[0]
        once = layer(torch.tensor([[0, 2, 1]]), [basis, att, root, bias])
        twice = layer(torch.tensor([[0, 2, 1], [1, 2, 1]]), [basis, att, root, bias])
        base = (root + bias).to(once.dtype)
        factor = 2 if normaliser is neighbour_sum else 1
        assert torch.allclose(twice - base, factor * (once - base), atol=1e-5)


def test_mean_is_sum_where_no_relation_repeats() -> None:
    edges = make_edges()
    first = {(i, r): row for row, (_, i, r) in enumerate(edges.tolist())}
    edges = edges[sorted(first.values())]
    sums, means = (
        relational_sum(*weights(), index(edges, n)) for n in (neighbour_sum, neighbour_mean)
    )
    assert torch.equal(sums, means)


@pytest.mark.parametrize("impl", ["portable", "native"])
def test_the_operator_holds_in_every_graph(impl: str) -> None:
    if impl == "native" and not native.available():
        pytest.skip("no compiler")
    tensors = [tensor.float().requires_grad_() for tensor in weights()]
    edges = index(make_edges())
    torch.library.opcheck(neighbours, (*tensors, *edges.tensors, impl))

    def call(*tensors: Tensor) -> Tensor:
        return relational_sum(*tensors, edges, impl=impl).square().sum()  # type: ignore[arg-type]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    wanted, found = call(*tensors), compiled(*tensors)
    assert torch.allclose(found, wanted)
    gradients = torch.autograd.grad(wanted, tensors)
    close(list(torch.autograd.grad(found, tensors)), list(gradients), 1e-6)


@pytest.mark.parametrize("impl", ["portable", "native"])
def test_memory_does_not_grow_with_relations(impl: str) -> None:
    """Acceptance check 7: nothing of R N d numbers is kept, here with 50 relations."""
    if impl == "native" and not native.available():
        pytest.skip("no compiler")
    nodes, relations, width = 500, 50, 32
    edges = index(make_edges(nodes, relations, 1000), num_nodes=nodes, num_relations=relations)
    tensors = [t.float().requires_grad_() for t in weights(0, (nodes, relations, 2, width))]
    kept = saved_bytes(lambda: relational_sum(*tensors, edges, impl=impl))  # type: ignore[arg-type]
    parameters = sum(tensor.nbytes for tensor in tensors)
    assert kept <= parameters + sum(tensor.nbytes for tensor in edges.tensors)
    assert kept < relations * nodes * width * 4 / 5

    largest = _Largest()
    with largest:
        relational_sum(*tensors, edges, impl=impl).sum().backward()  # type: ignore[arg-type]
    rows = len(edges.edge_target) + nodes * 2
    assert largest.numbers <= rows * width


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Numbers of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_without_a_compiler_it_warns_once_and_is_portable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path) -> None:
        raise machinery.UnavailableError("no compiler")

    monkeypatch.setattr(machinery, "load", fail)
    native.library.cache_clear()
    native.available.cache_clear()
    tensors = [tensor.float() for tensor in weights()]
    edges = index(make_edges())
    try:
        with pytest.warns(UserWarning, match="slower PyTorch code: no compiler"):
            found = relational_sum(*tensors, edges)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            relational_sum(*tensors, edges)
    finally:
        native.library.cache_clear()
        native.available.cache_clear()
    assert torch.equal(found, portable.forward(*tensors, edges.tensors))


def test_a_named_implementation_that_cannot_says_why() -> None:
    with pytest.raises(ValueError, match=r"float32, not in torch\.float64"):
        relational_sum(*weights(), index(make_edges()), impl="native")


def test_weights_of_another_graph_are_refused() -> None:
    tensors = weights(sizes=(N + 1, R, B, d))
    with pytest.raises(ValueError, match=r"basis: shape \(41, 3, 7\), the graph needs \(40, 3, 7"):
        relational_sum(*tensors, index(make_edges()))


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        (torch.zeros(0, 3, dtype=torch.int64), "the graph has none"),
        (torch.zeros(4, 2, dtype=torch.int64), r"\(E, 3\) are needed"),
        (torch.zeros(4, 3), r"\(E, 3\) are needed"),
        (torch.tensor([[0, N, 0]]), "a target lies outside 0 to 39: 40 to 40"),
        (torch.tensor([[-1, 0, 0]]), "a source lies outside"),
        (torch.tensor([[0, 0, R]]), "a relation lies outside 0 to 4"),
        (torch.tensor([[3, 4, 1], [3, 4, 1]]), r"\(3, 4, 1\) stands twice"),
    ],
)
def test_rows_that_are_no_edges_are_refused(edges: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        index(edges)


def test_the_graph_is_not_part_of_the_weights() -> None:
    layer = RelationalGraphLayer(
        index(make_edges()), width=d, num_bases=B, initialise=initialise_uniform
    )
    assert set(layer.state_dict()) == {"basis", "att", "root", "bias"}


def test_initialisations_have_the_bounds_of_their_libraries() -> None:
    """Bounds of torch_geometric 1.3 and 2.8; the largest draws come close to them."""
    edges = index(make_edges())
    uniform, glorot = (
        RelationalGraphLayer(edges, width=d, num_bases=B, initialise=initialise)
        for initialise in (initialise_uniform, initialise_glorot)
    )
    bound = (B * N) ** -0.5
    for name in ("basis", "root"):
        assert 0.9 * bound < uniform.get_parameter(name).abs().max() <= bound
    assert 0 < uniform.bias.abs().max() <= bound
    assert 0.9 * (6 / (N + d)) ** 0.5 < glorot.basis.abs().max() <= (6 / (N + d)) ** 0.5
    assert 0.9 * (6 / (N + d)) ** 0.5 < glorot.root.abs().max() <= (6 / (N + d)) ** 0.5
    assert glorot.att.abs().max() <= (6 / (R + B)) ** 0.5
    assert not glorot.bias.any()
